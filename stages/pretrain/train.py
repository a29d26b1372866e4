"""Pretrain on blocks of plain text with next-token cross entropy and AdamW."""

from collections.abc import Callable, Iterator, Sequence

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from rlhf.inputs.files import read_records
from rlhf.inputs.records import Prompt, Text
from rlhf.inputs.streams import torch_stream
from rlhf.measuring.fact_recall import fact_recall
from rlhf.models.loading import new_policy
from rlhf.models.saving import save_policy
from rlhf.runs.checkpoints import Checkpoints
from rlhf.runs.folder import MODEL_FILES, folders_released
from rlhf.runs.run import Run, open_run
from rlhf.runs.settings import settings_in_use
from rlhf.runs.stateful import Generators, parts_of
from rlhf.runs.stopwatch import is_bar_hidden
from rlhf.training import sharding
from rlhf.training.nonfinite import with_remedy
from rlhf.training.processes import (
    own_share,
    start_accelerator,
    sums_over_processes,
    warn_of_float32,
)
from rlhf.training.step import Step, make_train_state
from stages.pretrain.config import Config
from stages.pretrain.tokenizer import train_tokenizer

IGNORED = -100
"""Target of a token whose prediction does not count."""


@folders_released()
def pretrain(config: Config) -> None:
    """Train a tokenizer and a model from scratch and save both as one plain model folder."""
    inputs = {"text": config.text_path, "text_held_out": config.text_held_out_path}
    if config.facts_path is not None:
        inputs["facts"] = config.facts_path
    accelerator = start_accelerator()
    warn_of_float32(accelerator)
    run = open_run(config, stage="pretrain", inputs=inputs, files=MODEL_FILES)
    checkpoints = Checkpoints(run, accelerator, config.checkpoint_every)
    texts = _read_texts(config.text_path)
    probes = [] if config.facts_path is None else read_records(config.facts_path, Prompt)
    tokenizer = train_tokenizer(texts, config.vocab_size)
    blocks = to_blocks(tokenizer, texts, config.block_length)
    held_out = to_blocks(tokenizer, _read_texts(config.text_held_out_path), config.block_length)

    set_seed(config.seed)
    shape = {**settings_in_use(config.architecture), "head_dim": config.architecture.head_dim}
    model = new_policy(shape, tokenizer)

    def evaluate() -> dict[str, float]:
        model.eval()
        figures = {"pretrain/held_out_loss": held_out_loss(model, held_out, config.batch_size)}
        if probes:
            figures["pretrain/fact_recall"] = fact_recall(model, tokenizer, probes)
        return figures

    num_parameters = model.num_parameters()
    measured, weights = _train(config, accelerator, run, checkpoints, model, blocks, evaluate)
    results = {
        "num_parameters": num_parameters,
        "vocab_size": len(tokenizer),
        "num_tokens": blocks.numel() * config.num_epochs,
        **{name.removeprefix("pretrain/"): value for name, value in measured.items()},
    }
    if accelerator.is_main_process:
        told = f"held-out loss {results['held_out_loss']:.3f} nats a token"
        if probes:
            told += f", recall of facts {results['fact_recall']:.3f}"
        print(f"pretrain: {told}; {num_parameters:,} parameters")
        save_policy(model, tokenizer, run.dir, weights)
    accelerator.wait_for_everyone()
    run.finish(results)


def to_blocks(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], block_length: int
) -> Tensor:
    """Join all texts, each after the tokenizer's document token; cut into (rows, block_length).

    The tokens after the last whole row are left out.

    Raises:
        ValueError: The texts do not fill one row.
    """
    stream = [token for ids in tokenizer(list(texts)).input_ids for token in ids]
    num_rows = len(stream) // block_length
    if num_rows == 0:
        raise ValueError(
            f"the text has {len(stream)} tokens, fewer than block_length {block_length}; "
            "give more text or a shorter block_length"
        )
    return torch.tensor(stream[: num_rows * block_length]).view(num_rows, block_length)


def draw_batches(num_rows: int, batch_size: int, num_epochs: int, seed: int) -> Iterator[list[int]]:
    """Yield the row numbers of each update, in a new order every epoch.

    Rows left over after the last full batch of an epoch are not used in it.
    """
    generator = torch_stream(seed, "pretrain/order")
    for _ in range(num_epochs):
        order = torch.randperm(num_rows, generator=generator).tolist()
        for start in range(0, num_rows - batch_size + 1, batch_size):
            yield order[start : start + batch_size]


def language_model_loss(model: nn.Module, blocks: Tensor) -> Tensor:
    """Return the mean cross entropy, in nats, of the predicted tokens of blocks (batch, time)."""
    logits = model(input_ids=blocks, use_cache=False).logits
    # The last token of a row predicts nothing. To cut its logits off would copy the others.
    targets = nn.functional.pad(blocks[:, 1:], (0, 1), value=IGNORED)
    return nn.functional.cross_entropy(
        logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED
    )


@torch.no_grad()
def held_out_loss(model: nn.Module, blocks: Tensor, batch_size: int) -> float:
    """Return the mean nats a token over blocks (rows, time); every process measures all blocks."""
    device = next(model.parameters()).device
    losses = [
        language_model_loss(model, batch.to(device, non_blocking=True)) * len(batch)
        for batch in blocks.split(batch_size)
    ]
    return float(torch.stack(losses).sum() / len(blocks))


def _train(
    config: Config,
    accelerator: Accelerator,
    run: Run,
    checkpoints: Checkpoints,
    model: nn.Module,
    blocks: Tensor,
    evaluate: Callable[[], dict[str, float]],
) -> tuple[dict[str, float], dict[str, Tensor] | None]:
    """Train `model` in place and log `evaluate` every eval_steps steps.

    Returns:
        the last figures of `evaluate`, and the whole weights if the model holds only shards.

    Raises:
        ValueError: the processes cannot share a batch equally.
    """
    batch_size = min(config.batch_size, len(blocks))
    if batch_size < config.batch_size:
        accelerator.print(
            f"pretrain: batch_size is {config.batch_size}, and the text has {len(blocks)} rows of "
            f"block_length {config.block_length}: a step takes all of them"
        )
    if batch_size % accelerator.num_processes:
        raise ValueError(
            f"batches of {batch_size} rows cannot be shared equally by "
            f"{accelerator.num_processes} processes; give a batch_size that is a multiple, and "
            "enough text for one"
        )
    batches = list(draw_batches(len(blocks), batch_size, config.num_epochs, config.seed))
    groups = [(model, config.optim.learning_rate)]
    state = make_train_state(model, groups, config.optim, len(batches), accelerator)
    trained = parts_of(state)
    checkpoints.restore(trained.shared, {**trained.own, "generators": Generators()})
    first = checkpoints.step or 0
    measured: dict[str, float] = {}
    progress = tqdm(
        batches[first:],
        desc="pretrain",
        initial=first,
        total=len(batches),
        disable=is_bar_hidden(accelerator.is_main_process),
    )
    for number, rows in enumerate(progress, start=first + 1):
        state.model.train()
        step = Step(state)
        for batch in step.passes([blocks[own_share(accelerator, rows)]]):
            loss = language_model_loss(state.model, batch) / accelerator.num_processes
            step.add(loss, {"loss": loss})
        with with_remedy(config.optim):
            (grad_norm,) = step.take()
        if number % config.log_steps == 0 or number == len(batches):
            mean_loss = sums_over_processes(accelerator, step.sums)["loss"]
            progress.set_postfix(loss=f"{mean_loss:.3f}")
            metrics = {
                "pretrain/loss": mean_loss,
                "pretrain/grad_norm": grad_norm,
                "pretrain/learning_rate": step.learning_rate,
            }
            run.log(number, metrics)
        if number % config.eval_steps == 0 or number == len(batches):
            state.optimizer.zero_grad()  # the evaluation needs the memory
            with sharding.whole_weights(accelerator, state.model):
                measured = evaluate()
            run.log(number, measured)
        if number < len(batches):
            checkpoints.end_step(number)
    checkpoints.close()
    return measured, sharding.whole_state(accelerator, state.model)


def _read_texts(path: str) -> list[str]:
    return [record.text for record in read_records(path, Text)]
