"""Train with TRL's SFTTrainer, on rows that hold token ids and masks, so that it renders nothing.

No other module but compat.py imports TRL. We use its collation, its loss, its accumulation over
micro-batches normalised by tokens, its handling of several processes, and its checkpoints.
"""

import math
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn
from tqdm import tqdm
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.utils import logging as transformers_logging
from trl import SFTConfig, SFTTrainer
from trl.trainer.utils import add_fused_lm_head

from rlhf.inputs.packing import PromptTree
from rlhf.models.architectures import accepted, num_embeddings
from rlhf.models.saving import save_tokenizer, save_weights
from rlhf.runs.checkpoints import Checkpoints
from rlhf.runs.run import Run
from rlhf.runs.stateful import Fields, Stateful
from rlhf.runs.stopwatch import is_bar_hidden
from rlhf.training import sharding
from rlhf.training.optim import make_optimizer, make_schedule
from rlhf.training.out_of_memory import is_device_error, memory_of
from rlhf.training.processes import (
    TRAINER_STATE,
    check_launch,
    is_bf16,
    is_on_cpu,
    load_models_whole,
    naming,
    share_accelerator,
)
from rlhf.training.settings import OptimSettings
from stages.sft.compat import narrow_logits
from stages.sft.config import Config
from stages.sft.resume import ResumeCallback

Metrics = dict[str, float]
Measure = Callable[[PreTrainedModel, int], Metrics]

METRIC_NAMES = {
    "loss": "sft/loss",
    "learning_rate": "sft/learning_rate",
    "grad_norm": "sft/grad_norm",
    "mean_token_accuracy": "sft/token_accuracy",
    "entropy": "sft/entropy",
}
"""Maps the trainer's names to ours. sft/loss is the mean over the trained tokens of a batch."""


MIXTURE_FIELDS = ("output_router_logits", "router_aux_loss_coef")
"""Fields in the config of a mixture of experts. As in transformers, the loss over its experts is
added to the loss over tokens if and only if the first field is true."""


def fit(
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    trees: Sequence[PromptTree],
    config: Config,
    run: Run,
    checkpoints: Checkpoints,
    parts: Mapping[str, Stateful],
    measure: Measure,
) -> tuple[Path, int]:
    """Train on the trees in their order; return the chosen checkpoint's folder and step.

    Args:
        trees: rows of all epochs, batch after batch (see order_epochs).
        parts: the caller's state that checkpoints must hold.
        measure: called before training, every eval_every steps and after the last one.

    Raises:
        ValueError: the processes cannot share batch_size equally, or every measurement is nan.
    """
    config.rows_per_pass(_num_launched())  # may raise, so call it before touching the run's folder
    first_step = checkpoints.step or 0
    trainer = make_trainer(policy, tokenizer, trees, config, str(run.checkpoints), first_step)
    callback = _TrainingCallback(config, run, measure, trainer)
    parts = {**parts, "keeper": Fields(callback, "best_step", "best")}
    if checkpoints.are_written:  # a resumed run may need the best model of the last checkpoint
        trainer.args.save_total_limit = None
    trainer.add_callback(ResumeCallback(checkpoints, trainer, parts, callback.remove_others))
    trainer.add_callback(callback)
    place = partial(_place, trainer)
    with memory_of("sft training"), naming(trainer.accelerator, place):
        trainer.train()
    if callback.best_step is None:
        raise ValueError(
            f"{config.choose_by} is not a number at any measured step; lower "
            f"optim.learning_rate {config.optim.learning_rate}"
        )
    return callback.best_folder, callback.best_step


def make_trainer(
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    trees: Sequence[PromptTree],
    config: Config,
    checkpoint_dir: str,
    first_step: int = 0,
) -> "_PlainTrainer":
    """Make a trainer that takes each row once, in the order given.

    It skips the rows of the steps before `first_step`.
    """
    # Bars for building labels and writing checkpoints would break the line of our own bar.
    datasets.disable_progress_bars()
    transformers_logging.disable_progress_bar()
    with warnings.catch_warnings():
        # TRL's own SFTConfig still sets the field under its deprecated name.
        warnings.filterwarnings("ignore", message="`gradient_checkpointing` is deprecated")
        num_steps = math.ceil(len(trees) / config.batch_size)
        arguments = _arguments(config, checkpoint_dir, num_steps)
    mixture = policy.config.get_text_config()
    own = {name: getattr(mixture, name) for name in MIXTURE_FIELDS if hasattr(mixture, name)}
    if not own.get("output_router_logits"):
        arguments.router_aux_loss_coef = 0.0
    rows = [to_row(tree) for tree in trees[first_step * config.batch_size :]]
    trainer = _PlainTrainer(
        optim=config.optim,
        model=policy,
        args=arguments,
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    trainer.is_fused = _is_fused_right(policy)
    for name, value in own.items():  # TRL changed the config, which is saved with the model
        setattr(mixture, name, value)
    check_launch(trainer.accelerator)
    load_models_whole()
    trainer.remove_callback(PrinterCallback)
    return trainer


@torch.no_grad()
def _is_fused_right(policy: PreTrainedModel) -> bool:
    """Return whether TRL's fused head gives the loss of the model's own logits, tried on 16 tokens.

    The fused head knows only some ways of scaling logits, by the names of fields in the config.
    """
    ids = 1 + torch.arange(16, device=policy.device)[None] % (num_embeddings(policy) - 1)
    try:
        fused = policy(input_ids=ids, labels=ids, fused_lm_head=True).loss.item()
    except Exception as error:  # an architecture may fail in any way on the fused head
        if is_device_error(error):
            raise
        return False
    logits = policy(input_ids=ids, **accepted(policy, use_cache=False)).logits[0, :-1]
    expected = nn.functional.cross_entropy(logits.float(), ids[0, 1:]).item()
    # Both losses round differently; a wrong scale of logits differs by far more.
    tolerance = 1e-3 if policy.dtype == torch.float32 else 0.05
    return abs(fused - expected) <= tolerance * max(1.0, expected)


@contextmanager
def head_of_trainer(policy: PreTrainedModel, device: str) -> Iterator[None]:
    """Inside, a policy has the fused head that SFTTrainer gives its model, for the plan's dry run.

    The head's buffer of logits has 32,768 columns, and a smaller vocabulary writes only the first.
    On a CPU the others take no memory, so the buffer is no wider than the vocabulary there.
    """
    original = policy.forward
    add_fused_lm_head(policy, outputs=("log_probs", "entropy", "is_top1"))
    try:
        with narrow_logits(num_embeddings(policy)) if device == "cpu" else nullcontext():
            yield
    finally:
        policy.forward = original


def to_row(tree: PromptTree) -> dict[str, list[int]]:
    """Return the ids of a tree with one response, and a mask that is 1 where a token is trained."""
    (response,) = tree.responses
    return {
        "input_ids": [*tree.prompt, *response],
        "completion_mask": [0] * len(tree.prompt) + [1] * len(response),
    }


class _PlainTrainer(SFTTrainer):
    """Uses the project's optimizer and schedule.

    They are made when the Trainer asks, since under FSDP it accepts none that were made before.
    """

    is_fused: bool = True
    """Whether the loss comes from TRL's fused head; if not, from the model's own logits."""

    def __init__(self, optim: OptimSettings, **arguments: Any) -> None:
        self.optim = optim
        super().__init__(**arguments)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Compute TRL's loss, or the same mean over trained tokens from the model's own logits."""
        if self.is_fused:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        assert self.model is not None
        labels = inputs["labels"][:, 1:]
        named = {name: value for name, value in inputs.items() if name != "labels"}
        options = accepted(self.model, **named, use_cache=False, output_router_logits=False)
        outputs = model(**options)
        losses = nn.functional.cross_entropy(
            outputs.logits[:, :-1].float().transpose(1, 2), labels, reduction="none"
        )
        count = (labels >= 0).sum() if num_items_in_batch is None else num_items_in_batch
        loss = losses.sum() / count
        if num_items_in_batch is not None:  # counts all processes, whose gradients are averaged
            loss = loss * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        assert isinstance(self.model, PreTrainedModel)
        self.optimizer = make_optimizer([(self.model, self.optim.learning_rate)], self.optim)
        return self.optimizer

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        optimizer = optimizer or self.optimizer
        assert optimizer is not None
        self.lr_scheduler = make_schedule(optimizer, self.optim, num_training_steps)
        return self.lr_scheduler

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Save weights and tokenizer as every stage does, without Trainer's pickled arguments."""
        if not self.args.should_save:
            return
        assert output_dir is not None and isinstance(self.model, PreTrainedModel)
        assert isinstance(self.processing_class, PreTrainedTokenizerBase)
        save_weights(self.model, output_dir, state_dict)
        save_tokenizer(self.processing_class, output_dir)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write no card: a checkpoint is for our own use, and TRL's card would ask the hub."""

    def _send_telemetry(self) -> None:
        """Send nothing: what users train on their own files is private."""


class _TrainingCallback(TrainerCallback):
    """Logs, shows progress, measures, and makes the trainer save the best checkpoint so far."""

    def __init__(self, config: Config, run: Run, measure: Measure, trainer: SFTTrainer) -> None:
        self.best_step: int | None = None
        self.best = math.inf
        self._config = config
        self._run = run
        self._measure = measure
        self._trainer = trainer
        self._bar: tqdm | None = None

    @property
    def best_folder(self) -> Path:
        return self._run.checkpoints / f"checkpoint-{self.best_step}"

    def remove_others(self) -> None:
        """Delete the checkpoints that are no longer the best."""
        for folder in self._run.checkpoints.glob("checkpoint-*"):
            if folder != self.best_folder and PartialState().is_main_process:
                shutil.rmtree(folder, ignore_errors=True)

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        self._bar = tqdm(
            total=state.max_steps,
            initial=state.global_step,
            desc="sft",
            unit="step",
            disable=is_bar_hidden(state.is_world_process_zero),
        )
        if state.global_step == 0:
            self._measure_and_log(kwargs["model"], 0)

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        assert self._bar is not None
        self._bar.update()
        step = state.global_step
        if step % self._config.eval_every and step < state.max_steps:
            return
        metrics = self._measure_and_log(kwargs["model"], step)
        value = metrics[f"sft/{self._config.choose_by}"]
        loss = value if self._config.choose_by == "held_out_loss" else -value
        if loss < self.best:
            self.best, self.best_step = loss, step
            control.should_save = True

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        logs: dict[str, float] = kwargs["logs"]
        metrics = {METRIC_NAMES[key]: value for key, value in logs.items() if key in METRIC_NAMES}
        if "loss" in logs:
            self._run.log(state.global_step, metrics)
            if self._bar is not None:
                self._bar.set_postfix(loss=f"{logs['loss']:.3f}")

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def _measure_and_log(self, model: PreTrainedModel, step: int) -> Metrics:
        """Measure; give every process the first process's figures, so that all choose alike."""
        model.eval()
        accelerator = self._trainer.accelerator
        whole = sharding.whole_weights(accelerator, self._trainer.model_wrapped)
        with memory_of("evaluate"), whole, accelerator.autocast():
            metrics = broadcast_object_list([self._measure(model, step)])[0]
        model.train()
        self._run.log(step, metrics)
        if self._bar is not None and not self._bar.disable:
            self._bar.write(f"sft: step {step}: {figures_line(metrics)}")
        return metrics


def _place(trainer: SFTTrainer) -> str:
    return f"phase train of step {trainer.state.global_step}"


def figures_line(metrics: Mapping[str, float]) -> str:
    """Format figures as one line for the screen."""
    return ", ".join(f"{name.removeprefix('sft/')} {value:.3f}" for name, value in metrics.items())


def _num_launched() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def _arguments(config: Config, checkpoint_dir: str, num_steps: int) -> SFTConfig:
    num_processes = _num_launched()
    rows_per_pass = config.rows_per_pass(num_processes)
    arguments = SFTConfig(
        output_dir=checkpoint_dir,
        per_device_train_batch_size=rows_per_pass,
        gradient_accumulation_steps=config.batch_size // (rows_per_pass * num_processes),
        max_steps=num_steps,
        train_sampling_strategy="sequential",
        shuffle_dataset=False,
        completion_only_loss=True,
        max_length=None,
        max_grad_norm=config.optim.max_grad_norm,
        seed=config.seed,
        bf16=is_bf16(),
        gradient_checkpointing=config.gradient_checkpointing,
        logging_steps=1,
        eval_strategy="no",
        save_strategy="no",
        save_total_limit=1,
        save_only_model=True,
        report_to="none",
        use_cpu=is_on_cpu(),
        disable_tqdm=True,
        ddp_find_unused_parameters=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        accelerator_config=TRAINER_STATE,
    )
    share_accelerator(arguments)
    return arguments
