"""Runs controls: rewards from which PPO can learn nothing, or only something wrong."""

import torch

from tests.learning.test_known_optimum import Task, exact_logprobs, make_config, run_ppo

NUM_UPDATES = 20


def kl_to_reference(task: Task, numbers: torch.Tensor) -> float:
    logprobs = exact_logprobs(numbers)
    return float((logprobs.exp() * (logprobs - task.ref_logprobs)).sum())


def expected_reward(task: Task, numbers: torch.Tensor) -> float:
    return float((exact_logprobs(numbers).exp() * task.reward).sum())


def test_with_a_constant_reward_the_policy_stays_with_its_reference() -> None:
    """Only noise moves it, and the penalty brings it back. A reward would move it far."""
    task, rewarded = Task(0), Task(0)
    task.reward = torch.full_like(task.reward, 1.7)
    drift = kl_to_reference(task, run_ppo(task, make_config(NUM_UPDATES), seed=0))
    learned = kl_to_reference(rewarded, run_ppo(rewarded, make_config(NUM_UPDATES), seed=0))
    assert drift < 3e-3  # measured: 4e-4 to 6e-4 on three seeds
    assert learned > 1


def test_with_its_sign_flipped_the_reward_falls() -> None:
    task, flipped = Task(0), Task(0)
    flipped.reward = -flipped.reward
    start = expected_reward(task, task.ref)
    assert expected_reward(task, run_ppo(task, make_config(NUM_UPDATES), seed=0)) > start + 0.5
    assert expected_reward(task, run_ppo(flipped, make_config(NUM_UPDATES), seed=0)) < start - 0.5
