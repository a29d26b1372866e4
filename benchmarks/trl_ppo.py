"""Run PPOTrainer of TRL 1.12, the last release that has it; a sample is one update on all prompts.

    .venv-peers/bin/python -m benchmarks.trl_ppo    (started by the benchmark; see protocol.py)

PPOTrainer has its best settings here: no gradient checkpointing, all responses sampled in one
batch, passes of `micro_batch` sequences, and no sample tables.
"""

import time
from collections.abc import Callable
from itertools import cycle
from tempfile import TemporaryDirectory
from typing import Any

import torch
import trl
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

from benchmarks.endings import end_responses_at, greedy_draws
from benchmarks.protocol import Link
from benchmarks.workload import LEARNING_RATE, Workload

MANY_UPDATES = 1000


class UpdateGate(TrainerCallback):
    """Answers at the end of an update, and waits until the next one is asked for.

    The first update draws the likeliest tokens, as our side does.
    """

    def __init__(self, link: Link, sampled: "Sampled", settings: str) -> None:
        self.link = link
        self.settings = settings
        self.sampled = sampled
        self.metrics: dict[str, float] = {}
        self._greedy = greedy_draws()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self.link.ready(device=str(args.device), settings=self.settings)
        self._greedy.__enter__()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        self.metrics = dict(logs or {})

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if state.global_step == 1:
            self._greedy.__exit__(None, None, None)
        self.link.done(
            new_tokens=self.sampled.num_tokens,
            score=self.metrics["objective/scores"],
            value_loss=self.metrics["loss/value_avg"],
            ratio=self.metrics["val/ratio"],
            phases={"rollout": self.sampled.seconds},
        )


class SamePrompts(torch.utils.data.Dataset[dict[str, list[int]]]):
    """Gives the prompts in turn, whichever rows are asked for, so every batch has each prompt once.

    In a dataset of a single batch, every batch would be the last. In the last one, accelerate takes
    an optimizer step in every pass.
    """

    def __init__(self, prompts: list[list[int]]) -> None:
        self._prompts = cycle(prompts)
        self._num_rows = MANY_UPDATES * len(prompts)

    def __len__(self) -> int:
        return self._num_rows

    def __getitem__(self, _: int) -> dict[str, list[int]]:
        return {"input_ids": next(self._prompts)}


class Sampled:
    """Wraps the trainer's `batch_generation`, and notes its tokens and seconds."""

    def __init__(self, generate: Callable[..., Any], pad_id: int) -> None:
        self.generate = generate
        self.pad_id = pad_id
        self.seconds = 0.0
        self.num_tokens = 0

    def __call__(self, model: Any, queries: torch.Tensor, *args: Any, **options: Any) -> Any:
        started = time.perf_counter()
        found = self.generate(model, queries, *args, **options)
        self.seconds = time.perf_counter() - started
        responses = found[0][:, queries.shape[1] :]
        self.num_tokens = int((responses != self.pad_id).sum())
        return found


def main() -> None:
    link = Link()
    with TemporaryDirectory() as folder:
        run(link, folder)


def run(link: Link, output_dir: str) -> None:
    work = link.work
    tokenizer = AutoTokenizer.from_pretrained(work.policy, padding_side="left")
    policy, ref_policy = (_causal(work.policy) for _ in range(2))
    end_id = tokenizer.eos_token_id
    for model in (policy, ref_policy):
        end_responses_at(model, work.end_positions, end_id, tokenizer.pad_token_id)
    sampled = Sampled(ppo_trainer.batch_generation, tokenizer.pad_token_id)
    ppo_trainer.batch_generation = sampled
    settings = (
        f"TRL {trl.__version__} PPOTrainer, {work.dtype}, {work.micro_batch} sequences a pass"
    )
    trainer = PPOTrainer(
        args=arguments(work, output_dir, end_id),
        processing_class=tokenizer,
        model=policy,
        ref_model=ref_policy,
        reward_model=_scalar(work.reward_model),
        value_model=_scalar(work.reward_model),
        train_dataset=SamePrompts(work.prompts),
        eval_dataset=Dataset.from_list([{"input_ids": work.prompts[0]}]),
        callbacks=[UpdateGate(link, sampled, settings)],
    )
    trainer.train()


def arguments(work: Workload, output_dir: str, end_id: int) -> PPOConfig:
    num_prompts = len(work.prompts)
    return PPOConfig(
        output_dir=output_dir,
        per_device_train_batch_size=work.micro_batch,
        gradient_accumulation_steps=num_prompts // work.micro_batch,
        local_rollout_forward_batch_size=num_prompts,
        num_mini_batches=1,
        num_ppo_epochs=1,
        total_episodes=MANY_UPDATES * num_prompts,
        response_length=work.new_tokens,
        stop_token_id=None if work.end_positions is None else end_id,
        temperature=1.0,
        kl_coef=0.05,
        num_sample_generations=0,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        bf16=work.dtype == "bfloat16",
        gradient_checkpointing=False,
        use_cpu=not torch.cuda.is_available(),
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=0,
    )


def _causal(path: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, dtype="float32")


def _scalar(path: str) -> Any:
    return AutoModelForSequenceClassification.from_pretrained(path, num_labels=1, dtype="float32")


if __name__ == "__main__":
    main()
