"""Run TRL's RewardTrainer on all pairs of the rankings, in one step.

    python -m benchmarks.trl_reward    (started by the benchmark; see protocol.py)

RewardTrainer has its best settings here: no gradient checkpointing, ids given so that nothing is
tokenised, and passes of `micro_batch` pairs that together make up the step.
"""

from tempfile import TemporaryDirectory
from typing import Any

import torch
import trl
from datasets import Dataset
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from trl import RewardConfig, RewardTrainer

from benchmarks.gate import EpochGate
from benchmarks.protocol import Link
from benchmarks.workload import LEARNING_RATE, Workload, pairs_of

MANY_EPOCHS = 10_000


class FirstLoss(TrainerCallback):
    """Keeps the loss of the first step, which Trainer logs as the mean over the step's passes."""

    loss = float("nan")

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        if state.global_step == 1 and logs is not None:
            self.loss = float(logs["loss"])


def main() -> None:
    link = Link()
    with TemporaryDirectory() as folder:
        run(link, folder)


def run(link: Link, output_dir: str) -> None:
    work = link.work
    tokenizer = AutoTokenizer.from_pretrained(work.reward_model)
    model = AutoModelForSequenceClassification.from_pretrained(
        work.reward_model, num_labels=1, dtype="float32"
    )
    rows = [{"chosen_ids": better, "rejected_ids": worse} for better, worse in pairs_of(work)]
    first_loss = FirstLoss()
    settings = f"TRL {trl.__version__} RewardTrainer, {work.dtype}, {work.micro_batch} pairs a pass"
    gate = EpochGate(link, lambda: {"loss": first_loss.loss}, settings)
    trainer = RewardTrainer(
        model=model,
        args=arguments(work, output_dir),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        callbacks=[first_loss, gate],
    )
    trainer.train()


def arguments(work: Workload, output_dir: str) -> RewardConfig:
    return RewardConfig(
        output_dir=output_dir,
        per_device_train_batch_size=work.micro_batch,
        gradient_accumulation_steps=work.num_pairs // work.micro_batch,
        num_train_epochs=MANY_EPOCHS,
        train_sampling_strategy="sequential",
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=1.0,
        max_length=None,
        bf16=work.dtype == "bfloat16",
        gradient_checkpointing=False,
        use_cpu=not torch.cuda.is_available(),
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=0,
    )


if __name__ == "__main__":
    main()
