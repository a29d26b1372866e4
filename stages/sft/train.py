"""Run the sft stage from start to end."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from accelerate import Accelerator
from transformers import PreTrainedModel, set_seed

from rlhf.generation.answers import Answer
from rlhf.generation.engines import check_can_sample_alone
from rlhf.inputs.chat import Chat
from rlhf.inputs.packing import Packer
from rlhf.models.layout import packer_for
from rlhf.models.limits import check_context, check_vocabulary
from rlhf.models.loading import load_policy
from rlhf.models.one_copy import converted_once
from rlhf.models.saving import save_policy
from rlhf.models.settings import ModelSettings
from rlhf.models.tokenizers import load_chat
from rlhf.rewards.models import RewardModel, load_reward_model, measured_dtype
from rlhf.runs.checkpoints import Checkpoints
from rlhf.runs.folder import MODEL_FILES, folders_released
from rlhf.runs.run import Run, open_run
from rlhf.runs.stateful import Fields
from rlhf.training import sharding
from rlhf.training.offloading import free_unused
from rlhf.training.out_of_memory import memory_of
from rlhf.training.processes import start_accelerator, warn_of_float32
from stages.sft.config import Config
from stages.sft.measure import different_prompts, draw_samples, mean_loss, sample_rows
from stages.sft.rows import Rows, fit_batches, load_rows, order_epochs
from stages.sft.trainer import Metrics, figures_line, fit


@folders_released()
def train(config: Config) -> None:
    """Fine-tune a policy on demonstrations and write its folder."""
    accelerator = start_accelerator()
    check_can_sample_alone(config.generation, accelerator.num_processes)
    warn_of_float32(accelerator, config.model.dtype)
    run = open_run(config, stage="sft", inputs=_inputs(config), files=MODEL_FILES)
    checkpoints = Checkpoints(run, accelerator, config.checkpoint_every)
    chat = load_chat(config.model)
    rows = load_rows(config, chat)
    set_seed(config.seed)  # a new adapter must be the same on all processes
    with memory_of("load"), converted_once(accelerator):
        policy = load_policy(config.model, config.lora)
    check_vocabulary(policy, chat, config.model.path)
    limits = {name: getattr(config, name) for name in ("max_prompt_tokens", "max_response_tokens")}
    check_context(policy, config.model.path, limits)
    if config.text is not None:
        check_context(policy, config.model.path, {"max_text_tokens": config.max_text_tokens})
    if accelerator.is_main_process:
        _print_rows(rows)
    evaluator = _Evaluator(
        config=config,
        run=run,
        chat=chat,
        rows=rows,
        reward_model=_load_reward_model(config, chat, accelerator),
        accelerator=accelerator,
    )
    trees = [*(one.tree for one in rows.train), *rows.text]
    # A step takes no row twice, so an epoch is one pass even if there are few rows.
    fitted = fit_batches(config, len(trees), accelerator.num_processes)
    ordered = order_epochs(
        trees, config.num_epochs, min(config.batch_size, len(trees)), config.seed, fitted.batch_size
    )
    if accelerator.is_main_process:
        _print_steps(config, len(trees), len(ordered) // fitted.batch_size)
    parts = {"judge": Fields(evaluator, "base")}
    checkpoint, step = fit(
        policy, chat.tokenizer, ordered, fitted, run, checkpoints, parts, evaluator.measure
    )
    del policy
    free_unused()  # free the trained model and its optimizer before the chosen one is loaded
    if not accelerator.is_main_process:
        return
    chosen = load_policy(replace(config.model, path=str(checkpoint)), config.lora)
    chosen.to(accelerator.device)
    figures = evaluator.final(chosen)
    print(f"sft: chose step {step}: {figures_line(figures)}", flush=True)
    save_policy(chosen, chat.tokenizer, run.dir)
    num_steps = len(ordered) // fitted.batch_size
    run.finish({**figures, "chosen_step": step, "num_steps": num_steps, **_describe(rows)})


@dataclass(kw_only=True)
class _Evaluator:
    """Measures a policy on the held-out rows, and remembers the base model's figures."""

    config: Config
    run: Run
    chat: Chat
    rows: Rows
    reward_model: RewardModel | None
    accelerator: Accelerator
    base: Metrics | None = None
    packer: Packer | None = None
    """made at the first measurement, when the policy is already on its device"""

    def measure(self, policy: PreTrainedModel, step: int) -> Metrics:
        """Measure held-out losses, and the mean score of samples if choose_by needs it."""
        metrics = self._losses(policy)
        if self.reward_model is not None:
            metrics |= self._sample(policy, step)
        if step == 0:
            self.base = metrics
        return metrics

    def final(self, policy: PreTrainedModel) -> dict[str, Any]:
        """Return the figures of the chosen policy and of the base model."""
        assert self.base is not None
        metrics = self._losses(policy) | self._sample(policy, step=None)
        base = {f"base_{name}": value for name, value in self.base.items()}
        return {name.replace("sft/", ""): value for name, value in {**metrics, **base}.items()}

    def _losses(self, policy: PreTrainedModel) -> Metrics:
        if self.packer is None:
            self.packer = packer_for(policy, self.config.micro_batch_tokens)
        held_out = [one.tree for one in self.rows.held_out]
        metrics = {"sft/held_out_loss": mean_loss(policy, held_out, self.packer)}
        if self.rows.text_held_out:
            metrics["sft/text_loss"] = mean_loss(policy, self.rows.text_held_out, self.packer)
        return metrics

    def _sample(self, policy: PreTrainedModel, step: int | None) -> Metrics:
        examples = different_prompts(self.rows.held_out, self.config.num_samples)
        answers = draw_samples(policy, examples, self.chat, self.config)
        scores = None
        if self.reward_model is not None:
            with sharding.autocast_unwrapped(self.accelerator):
                scores = self.reward_model.score(answers).scores.tolist()
        self.run.samples(sample_rows(examples, answers, scores), step)
        return _figures(answers, scores)


def _figures(answers: Sequence[Answer], scores: Sequence[float] | None) -> Metrics:
    metrics = {
        "sft/eos_rate": _mean([answer.is_finished for answer in answers]),
        "sft/response_tokens": _mean([len(answer.response_ids) for answer in answers]),
    }
    return metrics if scores is None else {**metrics, "sft/reward_score": _mean(scores)}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _inputs(config: Config) -> dict[str, str]:
    inputs = {
        "model": config.model.path,
        "demonstrations": config.demonstrations,
        "text": config.text,
        "reward_model": config.reward_model,
    }
    return {name: path for name, path in inputs.items() if path is not None}


def _load_reward_model(config: Config, chat: Chat, accelerator: Accelerator) -> RewardModel | None:
    if config.reward_model is None:
        return None
    settings = ModelSettings(
        path=config.reward_model,
        dtype=measured_dtype(config.reward_model),
        attention=config.model.attention,
        trust_remote_code=config.model.trust_remote_code,
    )
    with converted_once(accelerator):
        return load_reward_model(
            settings,
            micro_batch_tokens=config.micro_batch_tokens,
            device=accelerator.device,
            policy_chat=chat,
            autocast=partial(sharding.autocast_unwrapped, accelerator),
        )


def _describe(rows: Rows) -> dict[str, Any]:
    return {
        "num_train": len(rows.train),
        "num_held_out": len(rows.held_out),
        "num_text": len(rows.text),
        "num_text_held_out": len(rows.text_held_out),
        "text_share": rows.text_share,
        **rows.lengths.as_metrics(),
    }


def _print_steps(config: Config, num_rows: int, num_steps: int) -> None:
    """Print how many passes the steps make, if that is not num_epochs."""
    if config.batch_size > num_rows:
        print(
            f"sft: batch_size is {config.batch_size}, and there are {num_rows} rows to train on: "
            f"a step takes all of them, {num_steps} in all",
            flush=True,
        )
    elif num_steps * config.batch_size != config.num_epochs * num_rows:
        print(
            f"sft: {num_steps} steps of {config.batch_size} rows, "
            f"{num_steps * config.batch_size / num_rows:.2f} passes over {num_rows} rows: the last "
            "step is filled up",
            flush=True,
        )


def _print_rows(rows: Rows) -> None:
    lengths = rows.lengths
    print(
        f"sft: {lengths.num_read} demonstrations read; dropped {lengths.num_prompts_dropped} for "
        f"their prompt's length and {lengths.num_responses_dropped} for their response's; "
        f"{lengths.num_prompts_cut} prompts cut at a turn"
    )
    if lengths.num_empty:
        print(f"sft: {lengths.num_empty} responses have no text, so they teach to end at once")
    print(
        f"sft: trains on {len(rows.train)} demonstrations and {len(rows.text)} pieces of text "
        f"({rows.text_share:.1%} of the trained tokens); measures {len(rows.held_out)} and "
        f"{len(rows.text_held_out)}",
        flush=True,
    )
