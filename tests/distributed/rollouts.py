"""What rollouts cost between the processes, and what they say."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
from accelerate.utils import gather_object
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from rlhf.generation.engines import generate
from rlhf.generation.interface import Decoding
from rlhf.generation.settings import GenerationSettings
from rlhf.training import sharding
from rlhf.training.optim import make_optimizer
from rlhf.training.processes import own_share, start_accelerator
from rlhf.training.settings import OptimSettings
from stages.ppo import rollout as rollout_module
from stages.ppo import train as ppo_train
from stages.ppo.learner import PolicyAndValue
from stages.ppo.rollout import Rollout, RolloutWorker
from tests.rlhf.tiny_models import tiny_policy_of, tiny_scalar_of

PROMPTS = [[3 + (5 * i + j) % 50 for j in range(1 + i % 4)] for i in range(9)]
"""An odd number, so that one process has one more."""


class Gathers(TorchDispatchMode):
    """Counts the collectives that give each process what lies on all of them."""

    count = 0

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.count += "allgather" in func.__name__
        return func(*args, **(kwargs or {}))


def greedy_rollouts(*max_new_tokens: int) -> list[dict[str, Any]]:
    """The likeliest responses to PROMPTS, by all processes, for each of these lengths: "responses",
    and the "gathers" of one rollout from the first one's begin to the last one's end."""
    accelerator = start_accelerator()
    policy, value_model = tiny_policy_of("llama"), tiny_scalar_of("llama")
    optimizer = make_optimizer([(policy, 1e-3), (value_model, 1e-3)], OptimSettings())
    model, _ = sharding.prepare(accelerator, PolicyAndValue(policy, value_model), optimizer)
    rollouts = []
    for length in max_new_tokens:
        with Gathers() as gathers, sharding.whole_weights(accelerator, model):
            drawn = generate(
                policy,
                own_share(accelerator, PROMPTS),
                GenerationSettings(),
                Decoding(end_id=1, max_new_tokens=length, temperature=0.0),
            )
        numbers = own_share(accelerator, range(len(PROMPTS)))
        gathered = gather_object(list(zip(numbers, drawn.responses, strict=True)))
        responses = [response for _, response in sorted(gathered)]
        rollouts.append({"responses": responses, "gathers": gathers.count})
    return rollouts


@contextmanager
def watched_rollouts() -> Iterator[list[dict[str, Any]]]:
    """Of each rollout of PPO inside:

    "gathers" from its first token to its advantages; the "tokens" of its longest response; the
    "type" of the reference's weights; the largest "difference" between the log-probabilities of the
    policy and the reference; "whole", which maps the name of a pass to whether this process held
    all weights of the policy, and of the value model.
    """
    seen: list[dict[str, Any]] = []
    roll_out = ppo_train.roll_out

    def watched(
        policy: Any, value_model: Any, worker: RolloutWorker, *args: Any, **options: Any
    ) -> Rollout:
        with Gathers() as gathers, whole_models_watched([policy, value_model]) as whole:
            rollout = roll_out(policy, value_model, worker, *args, **options)
        difference = (rollout.logprobs - rollout.ref_logprobs).abs().max()
        seen.append(
            {
                "gathers": gathers.count,
                "tokens": rollout.response_mask.shape[1],
                "type": str(worker.ref_policy.dtype),
                "difference": float(difference),
                "whole": whole,
            }
        )
        return rollout

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ppo_train, "roll_out", watched)
        yield seen


@contextmanager
def whole_models_watched(models: Sequence[nn.Module]) -> Iterator[dict[str, list[bool]]]:
    """Maps each pass of a rollout to whether this process holds all weights of each model."""
    seen: dict[str, list[bool]] = {}
    with pytest.MonkeyPatch.context() as patch:
        for place, name in (
            (RolloutWorker, "sample"),
            (RolloutWorker, "check"),
            (RolloutWorker, "raw_scores"),
            (RolloutWorker, "ref_logprobs"),
            (rollout_module, "compute_values"),
        ):
            patch.setattr(place, name, _noting(getattr(place, name), name, models, seen))
        yield seen


def _noting(
    run: Callable[..., Any], name: str, models: Sequence[nn.Module], seen: dict[str, list[bool]]
) -> Callable[..., Any]:
    def noted(*args: Any, **options: Any) -> Any:
        seen[name] = [is_whole(model) for model in models]
        return run(*args, **options)

    return noted


def is_whole(model: nn.Module) -> bool:
    """Whether this process holds all weights. ZeRO-3 leaves a split weight without numbers."""
    return all(p.numel() and not isinstance(p, DTensor) for p in model.parameters())
