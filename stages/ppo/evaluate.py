"""Measure the policy on held-out prompts."""

from collections.abc import Sequence

import torch

from rlhf.inputs.packing import response_batch
from rlhf.inputs.streams import torch_stream
from rlhf.maths.kl import k1
from rlhf.runs.run import Run
from rlhf.training.nonfinite import told_by_all
from rlhf.training.processes import own_share, sum_over_processes
from stages.ppo.config import Config
from stages.ppo.learner import Learner
from stages.ppo.rollout import Episode, Sampler


def is_due(update: int, config: Config) -> bool:
    """Tell whether the held-out prompts are answered after this update."""
    if config.prompts_held_out is None:
        return False
    return update % config.eval_every == 0 or update == config.num_updates - 1


def evaluate(
    learner: Learner,
    sampler: Sampler,
    held_out: Sequence[Episode],
    run: Run,
    number: int,
    config: Config,
) -> dict[str, float]:
    """Measure score, KL, length and ends on held-out prompts, with the same random draws each
    time."""
    episodes = own_share(learner.state.accelerator, held_out)
    sums = torch.zeros(4)
    with told_by_all():
        if episodes:  # with fewer prompts than processes, some processes have none
            sums = _answer(learner, sampler, episodes, run, number, config)
    score, nats, tokens, ended = sum_over_processes(learner.state.accelerator, sums).tolist()
    return {
        "ppo/held_out_score": score / len(held_out),
        "ppo/held_out_kl": nats / len(held_out),
        "ppo/held_out_tokens": tokens / len(held_out),
        "ppo/held_out_eos_rate": ended / len(held_out),
    }


def _answer(
    learner: Learner,
    sampler: Sampler,
    episodes: Sequence[Episode],
    run: Run,
    number: int,
    config: Config,
) -> torch.Tensor:
    """Answer this process's held-out prompts and log samples.

    Returns sums over the prompts, (4,): score, KL, tokens, responses that end.
    """
    process = learner.state.accelerator.process_index
    generator = torch_stream(config.seed, "ppo/held out", process)
    policy = learner.models.policy
    trees, _ = sampler.sample(policy, episodes, generator)
    scored, finished = sampler.score(episodes, trees)
    scores = scored.scores
    _, mask = response_batch([tree.responses[0] for tree in trees])
    kl = k1(sampler.logprobs(policy, trees), sampler.ref_logprobs(trees), mask)
    run.samples(
        [
            {
                "prompt": episode.record.prompt,
                "response": sampler.chat.decode(tree.responses[0]),
                "score": round(float(score), 4),
                "kl": round(float(nats), 4),
                "tokens": len(tree.responses[0]),
            }
            for episode, tree, score, nats in zip(episodes, trees, scores, kl.sum(1), strict=True)
        ][: config.num_samples],
        step=number,
    )
    return torch.stack([scores.sum(), kl.sum(), mask.sum(), finished.sum()]).double()
