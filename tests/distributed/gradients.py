"""The gradient of one global batch, of PPO with ptx, of the reward model and of SFT, by however
many processes call `all_steps` and whatever is split between them."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import repeat
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

from rlhf.inputs.packing import Packer, PromptTree, response_batch, text_tree
from rlhf.inputs.records import Ranking
from rlhf.models.full import checkpoint_activations
from rlhf.models.passes import compute_logprobs, compute_values
from rlhf.models.settings import ModelSettings
from rlhf.rewards.settings import RewardSettings
from rlhf.training import sharding
from rlhf.training.processes import is_asked_for, own_share, start_accelerator
from rlhf.training.settings import OptimSettings
from rlhf.training.step import make_train_state
from stages.ppo.config import Config, PPOSettings, PtxSettings
from stages.ppo.learner import Learner, PolicyAndValue
from stages.ppo.rollout import Rollout
from stages.ppo.update import update
from stages.rm.batches import GlobalBatches
from stages.rm.config import Config as RewardModelConfig
from stages.rm.data import Example
from stages.rm.update import update as update_reward_model
from stages.sft.config import Config as FineTuningConfig
from stages.sft.trainer import make_trainer
from tests.rlhf.tiny_models import VOCAB, byte_tokenizer, tiny_policy_of, tiny_scalar_of

OPTIM = OptimSettings(learning_rate=1e-3, max_grad_norm=float("inf"))
BUDGET = 40
"""Tokens a pass: the first process's episodes need more passes than the second's."""


Gradients = dict[str, Tensor]
"""Name of a parameter -> its gradient, of the global batch and in full."""


@dataclass
class Step:
    """What was seen as a step was taken."""

    gradients: Gradients = field(default_factory=dict)
    whole: list[str] = field(default_factory=list)
    """Parameters that this process held in full, and not just a shard of."""


@contextmanager
def recorded(module: nn.Module) -> Iterator[Step]:
    """The step that the module takes inside; of several, the last."""
    found = Step()

    def record(*_: object) -> None:
        parameters = dict(module.named_parameters())
        found.whole = [name for name, parameter in parameters.items() if parameter.numel()]
        own = sharding.local_gradients(parameters.values())
        for (name, parameter), gradient in zip(parameters.items(), own, strict=True):
            found.gradients[name] = whole_gradient(parameter, gradient).clone()

    with pytest.MonkeyPatch.context() as patch:
        if is_asked_for("ACCELERATE_USE_DEEPSPEED"):
            import deepspeed

            patch.setattr(deepspeed.DeepSpeedEngine, "step", record)
            yield found
        else:
            handle = register_optimizer_step_pre_hook(record)
            yield found
            handle.remove()
    assert found.gradients


def whole_gradient(parameter: nn.Parameter, own: Tensor) -> Tensor:
    if is_asked_for("ACCELERATE_USE_DEEPSPEED"):
        from deepspeed.utils import safe_get_full_grad

        return safe_get_full_grad(parameter)
    if isinstance(parameter.grad, DTensor):
        return parameter.grad.full_tensor()
    return own.view(parameter.shape)


def ppo_step(ptx: PtxSettings, *, recomputed: bool = False) -> Step:
    """Of policy and value loss on eight episodes, and of the text loss on four pieces of text.

    Args:
        recomputed: activations are computed again in the backward pass.
    """
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
    teacher = tiny_policy_of("llama") if ptx.targets == "reference" else None
    packer = Packer(BUDGET)
    generator = torch.Generator().manual_seed(0)
    rollout = make_rollout(policy, value_model, packer, generator)
    with torch.no_grad():  # a policy that moved since, so that ratios are not 1
        for parameter in [*policy.parameters(), *value_model.parameters()]:
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    if recomputed:
        checkpoint_activations(policy)
        checkpoint_activations(value_model.classifier)
    both = PolicyAndValue(policy, value_model)
    groups = [(policy, 1e-3), (value_model, 1e-3)]
    learner = Learner(make_train_state(both, groups, OPTIM, 10, accelerator), packer)
    texts = [text_tree(random_ids(generator, length)) for length in (9, 12, 5, 7)]
    share = torch.tensor(own_share(accelerator, range(8)))
    own_texts = repeat(own_share(accelerator, texts))
    with recorded(both) as found:
        update(
            learner,
            rollout.select(share),
            own_texts,
            config,
            torch.Generator(),
            teacher=lambda: nullcontext(teacher),
        )
    return found


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
        ref_logprobs=logprobs,
        values=values,
        rewards=zeros,
        advantages=noise[0],
        returns=values + noise[1],
    )


def random_ids(generator: torch.Generator, length: int) -> tuple[int, ...]:
    return tuple(torch.randint(3, VOCAB, (length,), generator=generator).tolist())


def ranking_step(folder: Path) -> Step:
    """Of the ranking loss on five rankings of two to six responses, of uneven weights."""
    accelerator = start_accelerator()
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
    model = tiny_scalar_of("llama")
    state = make_train_state(model, [(model, 1e-3)], OPTIM, 1, accelerator)
    (share,) = GlobalBatches(len(examples), config, accelerator)
    with recorded(model) as found:
        update_reward_model(state, [examples[i] for i in share], Packer(BUDGET), config)
    return found


def fine_tuning_step(folder: Path) -> Step:
    """Of the SFT loss on eight demonstrations of uneven lengths, two at a time."""
    start_accelerator()
    generator = torch.Generator().manual_seed(2)
    trees = [
        PromptTree(random_ids(generator, 3), (random_ids(generator, length),))
        for length in (12, 1, 9, 2, 14, 3, 10, 1)
    ]
    config = FineTuningConfig(
        output_dir=str(folder / "sft"),
        model=ModelSettings(path="unused"),
        demonstrations="unused",
        batch_size=8,
        micro_batch_size=2,
        optim=OPTIM,
    )
    policy = tiny_policy_of("llama")
    tokenizer = byte_tokenizer("<s>", "</s>", "<pad>", eos_token="</s>", pad_token="<pad>")
    trainer = make_trainer(policy, tokenizer, trees, config, str(folder / "checkpoints"))
    with recorded(policy) as found:
        trainer.train()
    return found


def all_steps(folder: Path) -> Step:
    """By loss and name of the parameter."""
    steps = {
        "ppo": ppo_step(PtxSettings(coef=0.7, text="unused")),
        "ratio": ppo_step(PtxSettings(coef=1.0, grad_norm_ratio=2.0, text="unused")),
        "taught": ppo_step(PtxSettings(coef=0.7, text="unused", targets="reference")),
        "recomputed": ppo_step(PtxSettings(coef=0.7, text="unused"), recomputed=True),
        "rm": ranking_step(folder),
        "sft": fine_tuning_step(folder),
    }
    return Step(
        {
            f"{loss}/{k}": value
            for loss, step in steps.items()
            for k, value in step.gradients.items()
        },
        [f"{loss}/{name}" for loss, step in steps.items() for name in step.whole],
    )
