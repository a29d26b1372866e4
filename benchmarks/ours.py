"""Run our side of the comparison: samples of a workload through the stages' own code.

python -m benchmarks.ours    (started by the benchmark, which talks to it; see protocol.py)
"""

import os
from collections.abc import Iterator, Sequence
from itertools import repeat
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor, nn

from benchmarks.protocol import Link
from benchmarks.workload import LEARNING_RATE, Workload, text_blocks
from rlhf.generation.hf import draw
from rlhf.inputs.fitting import FittedPrompt
from rlhf.inputs.packing import PromptTree, text_tree
from rlhf.inputs.records import Prompt, Ranking
from rlhf.models.layout import packer_for
from rlhf.models.loading import load_scalar
from rlhf.models.settings import ModelSettings
from rlhf.models.tokenizers import load_chat
from rlhf.rewards.settings import RewardSettings
from rlhf.runs.stopwatch import Stopwatch
from rlhf.training.processes import start_accelerator
from rlhf.training.settings import OptimSettings
from rlhf.training.step import Step, make_train_state
from stages.ppo.config import Config as PPOConfig
from stages.ppo.config import PPOSettings, PtxSettings, RolloutSettings
from stages.ppo.learner import Learner
from stages.ppo.load import load_models
from stages.ppo.metrics import rollout_metrics, rollout_sums
from stages.ppo.rollout import Rollout, RolloutWorker, roll_out
from stages.ppo.update import update
from stages.rm.config import Config as RMConfig
from stages.rm.data import Example
from stages.rm.update import update as update_reward_model

MANY = 10_000
"""Epochs or updates to plan for; the benchmark ends the worker long before."""
OPTIM = OptimSettings(learning_rate=LEARNING_RATE, schedule="constant", betas=(0.9, 0.999))


def main() -> None:
    link = Link()
    os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16" if link.work.dtype == "bfloat16" else "no"
    with TemporaryDirectory() as folder:
        if link.work.kind == "rm":
            run_rm(link, folder)
        else:
            run_ppo(link, folder)


def run_rm(link: Link, output_dir: str) -> None:
    """Run samples for the reward model, each a step of stages.rm on all rankings."""
    work = link.work
    config = rm_config(work, output_dir)
    accelerator = start_accelerator()
    set_seed(0)
    model = load_scalar(config.model)
    packer = packer_for(model.classifier, config.micro_batch_tokens)
    groups = [(model, config.optim.learning_rate)]
    state = make_train_state(model, groups, config.optim, MANY, accelerator)
    examples = rankings(work)
    settings = f"{work.dtype}, passes of {work.micro_batch_tokens} tokens"
    link.ready(device=str(accelerator.device), settings=settings)
    whole, part = Stopwatch(accelerator.device), Stopwatch(accelerator.device)
    take = Step.take

    def timed_take(step: Step) -> list[float]:
        with part.phase("step"):
            return take(step)

    first_loss: float | None = None
    with mock.patch.object(Step, "take", timed_take):
        while True:
            with whole.phase("gradient"):
                metrics = update_reward_model(state, examples, packer, config)
            first_loss = metrics["rm/loss"] if first_loss is None else first_loss
            phases = whole.take() | part.take()
            phases["gradient"] -= phases["step"]
            link.done(loss=first_loss, phases=phases)


def rm_config(work: Workload, output_dir: str) -> RMConfig:
    return RMConfig(
        output_dir=output_dir,
        model=ModelSettings(path=work.reward_model),
        rankings=["given in code"],
        held_out=0.1,
        demonstrations="none",
        batch_size=len(work.prompts),
        micro_batch_tokens=work.micro_batch_tokens,
        num_epochs=MANY,
        optim=OPTIM,
    )


def rankings(work: Workload) -> list[Example]:
    """Make examples as stages.rm.data does, but from ids."""
    examples = []
    for number, (prompt, responses) in enumerate(zip(work.prompts, work.responses, strict=True)):
        ids = tuple(tuple(response) for response in responses)
        ranking = Ranking(
            prompt=f"prompt {number}",
            responses=tuple(f"response {i}" for i in range(len(ids))),
            ranks=tuple(range(1, len(ids) + 1)),
        )
        examples.append(Example(PromptTree(tuple(prompt), ids), ranking, is_cut=False))
    return examples


def run_ppo(link: Link, output_dir: str) -> None:
    """Run samples for PPO, each an update of stages.ppo: rollout, scores, all passes, a step."""
    work = link.work
    config = ppo_config(work, output_dir)
    loop = PPOLoop(work, config)
    settings = f"{work.dtype}, passes of {work.micro_batch_tokens} tokens"
    if config.rollout.check_every > 1:
        settings += ", log-probabilities from the sampler (rollout.check_every), as TRL's"
    link.ready(device=str(loop.accelerator.device), settings=settings)
    with mock.patch.object(loop.draws, "pick", lambda probabilities, _: probabilities.argmax(-1)):
        figures = loop.update()
    while True:
        link.done(**figures)
        figures = loop.update()


def ppo_config(work: Workload, output_dir: str) -> PPOConfig:
    has_text = work.text_blocks > 0
    return PPOConfig(
        output_dir=output_dir,
        policy=ModelSettings(path=work.policy),
        prompts="given in code",
        reward=RewardSettings(model=work.reward_model, missing_end="none"),
        rollout=RolloutSettings(
            batch_size=len(work.prompts),
            max_prompt_tokens=max(map(len, work.prompts)),
            max_new_tokens=work.new_tokens,
            check_every=MANY if work.dtype == "float32" else 1,  # TRL never checks
        ),
        ppo=PPOSettings(mini_batch_size=len(work.prompts), kl_coef=0.05),
        ptx=PtxSettings(coef=float(has_text), text="given in code" if has_text else None),
        optim=OPTIM,
        value_learning_rate=LEARNING_RATE,
        micro_batch_tokens=work.micro_batch_tokens,
        num_updates=MANY,
        ema_decay=None,
    )


class DrawsThatEnd:
    """Draws tokens for our engine `hf` and ends responses as `end_responses_at` does.

    The log-probabilities stay the policy's own: our packed passes call its body and its head, so a
    hook on the whole model is not called.
    """

    def __init__(
        self, policy: nn.Module, positions: Sequence[int] | None, end_id: int, pad_id: int
    ) -> None:
        self.end_id = end_id
        self.pad_id = pad_id
        self.pick = draw
        self._ends = torch.tensor(list(positions or []), dtype=torch.long)
        self._is_end = torch.zeros(0, dtype=torch.bool)
        policy.register_forward_hook(self._note, with_kwargs=True)

    def __call__(self, probabilities: Tensor, generator: torch.Generator | None) -> Tensor:
        """Draw one token for each row (rows,) from probabilities (rows, vocab)."""
        wanted = probabilities.masked_fill(self._is_end[:, None], 0.0)
        wanted[:, self.pad_id] = 0.0
        wanted[:, self.end_id] = self._is_end.to(wanted.dtype)
        return self.pick(wanted, generator)

    def _note(self, _: nn.Module, __: Any, inputs: dict[str, Any], ___: Any) -> None:
        if "position_ids" in inputs:  # a probe of the model has none
            last = inputs["position_ids"][:, -1]
            self._is_end = torch.isin(last + 1, self._ends.to(last.device))


class PPOLoop:
    """Loads the models of stages.ppo and runs its updates one at a time."""

    def __init__(self, work: Workload, config: PPOConfig) -> None:
        set_seed(0)
        self.accelerator: Accelerator = start_accelerator()
        self.config = config
        chat = load_chat(config.policy)
        self.stopwatch = Stopwatch(self.accelerator.device)
        self.learner: Learner
        self.worker: RolloutWorker
        self.learner, self.worker = load_models(config, chat, self.accelerator, self.stopwatch)
        self.draws = DrawsThatEnd(
            self.learner.models.policy,
            work.end_positions,
            chat.end_id,
            chat.tokenizer.pad_token_id,
        )
        self.prompts = [
            FittedPrompt(Prompt(prompt=f"prompt {number}"), tuple(ids))
            for number, ids in enumerate(work.prompts)
        ]
        num_ids = len(chat.tokenizer)
        texts = [text_tree(block) for block in text_blocks(work.text_blocks, num_ids)]
        self.texts: Iterator[list[PromptTree]] = repeat(texts)
        self.sampling = torch.Generator().manual_seed(0)
        self.order = torch.Generator().manual_seed(0)
        self.num_updates = 0

    def roll_out(self) -> Rollout:
        """Sample a response to every prompt, with all that the next update needs."""
        models = self.learner.models
        with self.accelerator.autocast(), mock.patch("rlhf.generation.hf.draw", self.draws):
            return roll_out(
                models.policy,
                models.value_model,
                self.worker,
                self.prompts,
                self.sampling,
                self.accelerator,
                is_checked=self.num_updates % self.config.rollout.check_every == 0,
            )

    def update(self) -> dict[str, Any]:
        """Run one update on all prompts; return its figures and the seconds of its phases."""
        self.stopwatch.take()
        rollout = self.roll_out()
        self.num_updates += 1
        sums = {name: float(value) for name, value in rollout_sums(rollout).items()}
        metrics = rollout_metrics(sums)
        metrics |= update(self.learner, rollout, self.texts, self.config, self.order)
        return {
            "new_tokens": int(sums["tokens"]),
            "score": metrics["ppo/score"],
            "value_loss": metrics["ppo/value_loss"],
            "ratio": metrics["ppo/ratio"],
            "phases": self.stopwatch.take(),
        }


if __name__ == "__main__":
    main()
