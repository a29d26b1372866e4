"""Measure how far rounding sets log-probabilities apart that PPO takes to be equal.

Sampler and packed pass compute them for the same tokens under the same weights, and so do the
passes of rollout and training. PPO's alarms PPO_SAMPLER and PPO_RATIO compare mean and high
quantile of the difference with fixed limits. The table shows both for several numbers of tokens,
and the largest difference too, which grows with that number.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.gpu_check.models import PRECISIONS, ppo_loop
from benchmarks.gpu_check.records import Emit, Row
from benchmarks.gpu_check.setting import Setting
from benchmarks.ours import PPOLoop
from stages.ppo.learner import RowOutputs
from stages.ppo.metrics import HIGH
from stages.ppo.monitor import TOKEN_NOISE, Noise, sampler_noise
from stages.ppo.rollout import Rollout
from stages.ppo.update import OldOutputs, mini_batches


def noise(setting: Setting, emit: Emit) -> None:
    """Report both differences for each precision and number of tokens."""
    for precision in PRECISIONS:
        loop = ppo_loop(setting, precision)
        rollout = loop.roll_out()
        for name, differences, limit in both_differences(loop, rollout):
            for count in setting.sizes.token_counts:
                head: Row = {"precision": precision, "difference": name, "tokens": count}
                limits: Row = {"mean's limit": limit.mean, "quantile's limit": limit.high}
                emit({**head, **spread(differences, count), **limits})
        assert rollout.check is not None
        entropy = rollout.check.entropy[rollout.response_mask].mean().item()
        emit({"precision": precision, "difference": "(entropy of the policy)", "mean": entropy})


def both_differences(loop: PPOLoop, rollout: Rollout) -> Iterator[tuple[str, Tensor, Noise]]:
    """Yield each difference by name, in nats (tokens,), with the limits of its alarm."""
    limit = TOKEN_NOISE["bfloat16"]
    assert rollout.check is not None
    of_sampler = rollout.logprobs - rollout.check.sampler_logprobs
    yield (
        "sampler, packed pass",
        of_sampler[rollout.response_mask].abs(),
        sampler_noise(loop.config, limit),
    )
    yield "rollout, training", first_log_ratios(loop, rollout), limit


def first_log_ratios(loop: PPOLoop, rollout: Rollout) -> Tensor:
    """Return the size of each token's log-ratio (tokens,) before any step is taken."""
    learner, found = loop.learner, []
    learner.state.model.train()
    for batch in mini_batches(rollout, loop.config, loop.order, loop.accelerator):
        old_outputs = OldOutputs.of(batch, loop.accelerator.device)
        for row in learner.packer.rows(batch.trees):
            row = row.to(loop.accelerator.device)
            outputs = RowOutputs(learner, row, loop.config.rollout.temperature)
            difference = outputs.logprobs.detach() - old_outputs.select(row).logprobs
            found.append(row.pack(difference).abs().cpu())
    learner.state.model.eval()
    return torch.cat(found)


def spread(differences: Tensor, count: int) -> Row:
    """Return mean, quantile and largest of groups of `count` tokens, each a mean over the groups.

    The tokens (tokens,) are shuffled first, since neighbours are of one response. Tokens that fill
    no group are left out.
    """
    order = torch.randperm(len(differences), generator=torch.Generator().manual_seed(0))
    num_groups = len(differences) // count
    assert num_groups, f"{len(differences)} tokens are fewer than {count}"
    groups = differences[order][: num_groups * count].view(num_groups, count).float()
    return {
        "groups": num_groups,
        "mean": groups.mean().item(),
        f"quantile {HIGH:g}": groups.quantile(HIGH, dim=1).mean().item(),
        "largest": groups.amax(1).mean().item(),
    }
