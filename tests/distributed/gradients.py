"""The gradient of one global batch, of PPO with ptx and of the reward model, by however many
processes run this program; the first one writes it.

    accelerate launch --config_file configs/accelerate/cpu2.yaml tests/distributed/gradients.py FILE
"""

import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))

from rlhf.config import ModelSettings, OptimSettings
from rlhf.distributed import own_share, start_accelerator
from rlhf.inference import compute_logprobs, compute_values
from rlhf.optim import gradients, make_optimizer, make_schedule
from rlhf.packing import Packer, PromptTree, response_batch, text_tree
from rlhf.records import Ranking
from rlhf.rewards import RewardSettings
from rlhf.runs import open_run
from stages.ppo.config import Config, PPOSettings, PtxSettings
from stages.ppo.rollout import Rollout
from stages.ppo.update import Learner, PolicyAndValue, optimizer_step
from stages.rm.config import Config as RewardModelConfig
from stages.rm.data import Example
from stages.rm.trainer import RankingTrainer
from tests.rlhf.tiny_models import VOCAB, tiny_policy_of, tiny_scalar_of

OPTIM = OptimSettings(learning_rate=1e-3, max_grad_norm=float("inf"))
BUDGET = 40
"""Tokens a pass: the first process's episodes need more passes than the second's."""


def ppo_gradient(ptx: PtxSettings) -> dict[str, Tensor]:
    """Of policy and value loss on eight episodes, and of the text loss on four pieces of text."""
    accelerator = start_accelerator()
    config = Config(
        output_dir="unused",
        policy=ModelSettings(path="unused"),
        prompts="unused",
        reward=RewardSettings(function="unused:unused"),
        ppo=PPOSettings(mini_batch_size=8),
        ptx=ptx,
        optim=OPTIM,
    )
    policy, value_model = tiny_policy_of("llama"), tiny_scalar_of("llama")
    packer = Packer(BUDGET)
    generator = torch.Generator().manual_seed(0)
    rollout = make_rollout(policy, value_model, packer, generator)
    with torch.no_grad():  # a policy that moved since, so that ratios are not 1
        for parameter in [*policy.parameters(), *value_model.parameters()]:
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    optimizer = make_optimizer([(policy, 1e-3), (value_model, 1e-3)], OPTIM)
    schedule = make_schedule(optimizer, OPTIM, 10)
    model, optimizer = accelerator.prepare(PolicyAndValue(policy, value_model), optimizer)
    learner = Learner(model, optimizer, schedule, None, packer, accelerator)
    texts = [text_tree(random_ids(generator, length)) for length in (9, 12, 5, 7)]
    share = torch.tensor(own_share(accelerator, range(8)))
    optimizer_step(learner, rollout.select(share), own_share(accelerator, texts), config)
    names = [name for name, _ in learner.models.named_parameters()]
    return dict(zip(names, gradients(learner.models.parameters()), strict=True))


def make_rollout(
    policy: Any, value_model: Any, packer: Packer, generator: torch.Generator
) -> Rollout:
    """Eight episodes; every second one, the first process's, is long, and one is cut short."""
    lengths = [12, 1, 9, 2, 14, 3, 10, 1]
    trees = [
        PromptTree(random_ids(generator, 3 + i % 3), (random_ids(generator, length),))
        for i, length in enumerate(lengths)
    ]
    _, mask = response_batch([tree.responses[0] for tree in trees])
    logprobs = compute_logprobs(policy, trees, packer)
    values = compute_values(value_model, trees, packer)
    noise = [torch.randn(mask.shape, generator=generator).where(mask, 0.0) for _ in range(2)]
    zeros = torch.zeros(mask.shape)
    return Rollout(
        trees=trees,
        response_mask=mask,
        finished=torch.ones(8, dtype=torch.bool),
        scores=torch.zeros(8),
        logprobs=logprobs,
        sampler_logprobs=logprobs,
        entropy=zeros,
        logprob_variance=zeros,
        ref_logprobs=logprobs,
        values=values,
        rewards=zeros,
        advantages=noise[0],
        returns=values + noise[1],
    )


def random_ids(generator: torch.Generator, length: int) -> tuple[int, ...]:
    return tuple(torch.randint(3, VOCAB, (length,), generator=generator).tolist())


def ranking_gradient(folder: Path) -> dict[str, Tensor]:
    """Of the ranking loss on five rankings of two to six responses, of uneven weights."""
    generator = torch.Generator().manual_seed(1)
    examples = []
    for number, size in enumerate((6, 2, 5, 3, 4)):
        responses = tuple(random_ids(generator, 1 + i) for i in range(size))
        ranking = Ranking(
            f"prompt {number}",
            tuple(f"response {i}" for i in range(size)),
            (*(1 + i // 2 for i in range(size - 1)), size),
            weight=1.0 + number,
        )
        examples.append(Example(PromptTree(random_ids(generator, 4), responses), ranking, False))
    config = RewardModelConfig(
        output_dir=str(folder / "rm"),
        model=ModelSettings(path="unused"),
        rankings=["unused"],
        held_out=0.5,
        demonstrations="unused",
        batch_size=5,
        optim=OPTIM,
    )
    run = open_run(config, stage="rm", inputs={})
    trainer = RankingTrainer(tiny_scalar_of("llama"), examples, Packer(BUDGET), config, run)
    model = trainer.accelerator.prepare(trainer.model)
    collate, share = trainer.data_collator, own_share(trainer.accelerator, examples)
    trainer.training_step(model, collate(share))
    parameters = dict(trainer.accelerator.unwrap_model(model).named_parameters())
    return dict(zip(parameters, gradients(parameters.values()), strict=True))


def all_gradients(folder: Path) -> dict[str, Tensor]:
    """By loss and name of the parameter."""
    found = {
        "ppo": ppo_gradient(PtxSettings(coef=0.7, text="unused")),
        "ratio": ppo_gradient(PtxSettings(coef=1.0, grad_norm_ratio=2.0, text="unused")),
        "rm": ranking_gradient(folder),
    }
    return {
        f"{loss}/{name}": gradient.clone()
        for loss, by_name in found.items()
        for name, gradient in by_name.items()
    }


def main() -> None:
    path = Path(sys.argv[1])
    found = all_gradients(path.parent)
    if Accelerator().is_main_process:
        processes = torch.tensor(Accelerator().num_processes)
        save_file({**found, "processes": processes}, path)


if __name__ == "__main__":
    main()
