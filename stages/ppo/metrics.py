"""Compute the metrics of a rollout and of an update, over the episodes of all processes."""

import math
from collections import defaultdict

import torch
from accelerate import Accelerator
from torch import Tensor

from rlhf.maths.kl import k1, k3
from rlhf.maths.masking import masked_sum
from rlhf.measuring.statistics import distinct_bigrams, most_frequent_answer
from rlhf.training.nonfinite import NonFiniteError, first_nonfinite, found_by_any
from rlhf.training.processes import max_over_processes, sums_over_processes
from stages.ppo.rollout import Rollout

Sums = dict[str, float]
"""Sums over this process's tokens and steps."""

HIGH = 0.999
"""The quantile that `describe_differences` reports."""

PART = "part "
"""Prefix that marks the sums of the score's parts among the sums of a rollout."""

JUDGED = "judged by "
"""Prefix that marks the number of episodes that a part judges."""


def describe(rollout: Rollout, accelerator: Accelerator) -> dict[str, float]:
    """Compute the rollout's metrics over all processes.

    Raises:
        NonFiniteError: a value of the rollout is not finite; all processes raise it.
    """
    totals = sums_over_processes(accelerator, rollout_sums(rollout))
    if not all(math.isfinite(total) for total in totals.values()):
        fields = vars(rollout) | ({} if rollout.check is None else rollout.check._asdict())
        tensors = {k: v for k, v in fields.items() if isinstance(v, torch.Tensor)}
        found = found_by_any(first_nonfinite(tensors, rollout.trees, "rollout"))
        raise found or NonFiniteError("a sum over the tokens", "rollout")
    logprobs, mask = rollout.logprobs, rollout.response_mask
    metrics = rollout_metrics(totals)
    apart = (logprobs - rollout.ref_logprobs)[mask]
    metrics |= describe_differences("ppo/reference_difference", apart, accelerator)
    if rollout.check is not None:
        apart = (logprobs - rollout.check.sampler_logprobs)[mask]
        metrics |= describe_differences("ppo/sampler_difference", apart, accelerator)
    return metrics


def describe_differences(name: str, nats: Tensor, accelerator: Accelerator) -> dict[str, float]:
    """Describe how far two log-probabilities of the same tokens are apart.

    Neither figure grows with the number of tokens, as a maximum would.

    Args:
        name: name of the first metric.
        nats: differences on this process's tokens, (tokens,), of either sign.

    Returns:
        `name`: mean absolute difference over the tokens of all processes; `name_high`: the
        difference that one token in a thousand exceeds, on the process where it is largest.
    """
    apart = nats.detach().abs().float()
    sums = sums_over_processes(accelerator, {"nats": apart.sum(), "tokens": float(len(apart))})
    high = apart.quantile(HIGH, interpolation="lower").item() if len(apart) else 0.0
    return {
        name: sums["nats"] / max(sums["tokens"], 1.0),
        f"{name}_high": max_over_processes(accelerator, high),
    }


def rollout_sums(rollout: Rollout) -> dict[str, Tensor]:
    """Sum over this process's episodes and tokens; `rollout_metrics` turns the sums into means."""
    mask = rollout.response_mask
    raw_advantages = (rollout.returns - rollout.values).where(mask, 0.0).double()
    kl = k1(rollout.logprobs, rollout.ref_logprobs, mask).double().sum(1)
    responses = [tree.responses[0] for tree in rollout.trees]
    num_bigrams = sum(max(len(response) - 1, 0) for response in responses)
    by_prompt: dict[tuple[int, ...], list[tuple[int, ...]]] = defaultdict(list)
    for tree in rollout.trees:
        by_prompt[tree.prompt].append(tree.responses[0])
    _, share = most_frequent_answer(list(by_prompt.values()))
    return {
        "episodes": torch.tensor(float(len(rollout.trees))),
        "tokens": mask.sum(),
        "score": rollout.scores.sum(),
        "score_squares": rollout.scores.double().square().sum(),
        "reward": rollout.rewards.sum(),
        "kl": kl.sum(),
        "kl_squares": kl.square().sum(),
        "kl_k3": k3(rollout.logprobs, rollout.ref_logprobs, mask).sum(),
        "finished": rollout.finished.sum(),
        "bigrams": torch.tensor(float(num_bigrams)),
        "distinct_bigrams": torch.tensor(distinct_bigrams(responses) * num_bigrams),
        "prompts": torch.tensor(float(len(by_prompt))),
        "one_answer": torch.tensor(share * len(by_prompt)),
        "value": masked_sum(rollout.values, mask),
        "returns": masked_sum(rollout.returns, mask),
        "return_squares": masked_sum(rollout.returns.double().square(), mask),
        "advantages": raw_advantages.sum(),
        "advantage_squares": raw_advantages.square().sum(),
        **_check_sums(rollout),
        **{PART + name: part.double().nansum() for name, part in rollout.parts.items()},
        **{JUDGED + name: (~part.isnan()).sum() for name, part in rollout.parts.items()},
    }


def _check_sums(rollout: Rollout) -> dict[str, Tensor]:
    """Sum what the check of the sampler needs; empty if this rollout was not checked."""
    check, mask = rollout.check, rollout.response_mask
    if check is None:
        return {}
    return {
        "entropy": masked_sum(check.entropy, mask),
        "excess": masked_sum(-rollout.logprobs.double() - check.entropy, mask),
        "excess_variance": masked_sum(check.logprob_variance.double(), mask),
    }


def rollout_metrics(sums: dict[str, float]) -> dict[str, float]:
    """Compute means over episodes (score and its parts, reward, KL, length) and tokens (the rest).

    A part's mean is over the episodes that it judges; where it judges none, it has no mean.
    `one_answer` is the share of different prompts that get the most frequent response.

    `sampler_excess` and `sampler_z` are there if the sampler was checked. `sampler_excess` is
    E[-log pi(token)] - entropy, in nats a token: how much less likely the sampled tokens are than
    the policy's distribution says. It is 0 on average for tokens drawn from that distribution.
    `sampler_z` is the same in standard errors.
    """
    episodes, tokens = sums["episodes"], sums["tokens"]
    mean_score, kl = sums["score"] / episodes, sums["kl"] / episodes
    kl_variance = max(sums["kl_squares"] / episodes - kl**2, 0.0)
    return_variance = sums["return_squares"] / tokens - (sums["returns"] / tokens) ** 2
    mean_advantage = sums["advantages"] / tokens
    advantage_squares = sums["advantage_squares"] / tokens
    advantage_variance = max(advantage_squares - mean_advantage**2, 0.0)
    return {
        "ppo/score": mean_score,
        "ppo/score_std": max(sums["score_squares"] / episodes - mean_score**2, 0.0) ** 0.5,
        "ppo/reward": sums["reward"] / episodes,
        "ppo/kl": kl,
        "ppo/kl_error": (kl_variance / episodes) ** 0.5,
        "ppo/kl_k3": sums["kl_k3"] / episodes,
        "ppo/response_tokens": tokens / episodes,
        "ppo/eos_rate": sums["finished"] / episodes,
        "ppo/distinct_2": sums["distinct_bigrams"] / max(sums["bigrams"], 1.0),
        "ppo/one_answer": sums["one_answer"] / sums["prompts"],
        "ppo/value": sums["value"] / tokens,
        "ppo/return": sums["returns"] / tokens,
        "ppo/advantage_std": advantage_variance**0.5,
        "ppo/value_error": advantage_squares**0.5,
        # 1e-8 stands in for a variance of 0, when all returns are equal.
        "ppo/explained_variance": 1 - advantage_variance / max(return_variance, 1e-8),
        **_check_metrics(sums),
        **{
            f"ppo/part/{name}": sums[PART + name] / judged
            for name, judged in _number_judged(sums).items()
            if judged
        },
    }


def _number_judged(sums: dict[str, float]) -> dict[str, float]:
    """Map each part of the score to the number of episodes that it judges."""
    return {
        key.removeprefix(JUDGED): number for key, number in sums.items() if key.startswith(JUDGED)
    }


def _check_metrics(sums: dict[str, float]) -> dict[str, float]:
    if "entropy" not in sums:
        return {}
    return {
        "ppo/entropy": sums["entropy"] / sums["tokens"],
        "ppo/sampler_excess": sums["excess"] / sums["tokens"],
        # 1e-12 stands in for a variance of 0, when every token was certain.
        "ppo/sampler_z": sums["excess"] / max(sums["excess_variance"], 1e-12) ** 0.5,
    }


def update_metrics(total: Sums) -> dict[str, float]:
    """Compute means over the tokens and the steps of an update."""
    tokens, steps = total["tokens"], total["steps"]
    metrics = {
        "ppo/policy_loss": total["policy_loss"] / tokens,
        "ppo/value_loss": total["value_loss"] / tokens,
        "ppo/approx_kl": total["approx_kl"] / tokens,
        "ppo/clip_fraction": total["clipped"] / tokens,
        "ppo/value_clip_fraction": total["value_clipped"] / tokens,
        "ppo/ratio": total["ratio"] / tokens,
        "ppo/policy_grad_norm": total["policy_grad_norm"] / steps,
        "ppo/value_grad_norm": total["value_grad_norm"] / steps,
    }
    if "ptx_tokens" in total:
        metrics["ppo/ptx_loss"] = total["ptx_nats"] / total["ptx_tokens"]
    if "ptx_norm" in total:
        metrics["ppo/ptx_grad_norm"] = total["ptx_norm"] / steps
        metrics["ppo/ppo_grad_norm"] = total["ppo_norm"] / steps
        metrics["ppo/grad_cosine"] = total["cosine"] / steps
        metrics["ppo/ptx_coef"] = total["ptx_coef"] / steps
    return metrics
