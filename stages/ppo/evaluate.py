"""Measure the policy on held-out prompts."""

from collections.abc import Sequence

import torch

from rlhf.generation.answers import Answer
from rlhf.inputs.fitting import FittedPrompt
from rlhf.inputs.packing import response_batch
from rlhf.inputs.records import Prompt
from rlhf.inputs.streams import torch_stream
from rlhf.maths.kl import k1
from rlhf.runs.run import Run
from rlhf.training.processes import own_share, sum_over_processes
from stages.ppo.config import Config
from stages.ppo.learner import Learner
from stages.ppo.rollout import RolloutWorker


def is_due(update: int, config: Config) -> bool:
    """Return whether the held-out prompts are answered after this update."""
    if config.prompts_held_out is None:
        return False
    return update % config.eval_every == 0 or update == config.num_updates - 1


def evaluate(
    learner: Learner,
    worker: RolloutWorker,
    held_out: Sequence[FittedPrompt[Prompt]],
    run: Run,
    number: int,
    config: Config,
) -> dict[str, float]:
    """Measure score, KL, length and ends on held-out prompts, with the same random draws each
    time."""
    accelerator, policy = learner.state.accelerator, learner.models.policy
    prompts = own_share(accelerator, held_out)
    generator = torch_stream(config.seed, "ppo/held out", accelerator.process_index)
    sums = torch.zeros(4)
    # With fewer prompts than processes, some processes have none, but all must gather.
    with worker.sampled(policy, prompts, generator, learner.gather) as answers:
        trees = [answer.tree for answer in answers]
        logprobs = worker.logprobs(policy, trees) if prompts else torch.zeros(0)
    if prompts:
        sums = _measure(worker, answers, logprobs, run, number, config)
    score, nats, tokens, ended = sum_over_processes(accelerator, sums).tolist()
    return {
        "ppo/held_out_score": score / len(held_out),
        "ppo/held_out_kl": nats / len(held_out),
        "ppo/held_out_tokens": tokens / len(held_out),
        "ppo/held_out_eos_rate": ended / len(held_out),
    }


def _measure(
    worker: RolloutWorker,
    answers: Sequence[Answer],
    logprobs: torch.Tensor,
    run: Run,
    number: int,
    config: Config,
) -> torch.Tensor:
    """Measure this process's answers and log samples.

    Returns sums over the prompts, (4,): score, KL, tokens, responses that end.
    """
    scores = worker.score(answers).scores
    _, mask = response_batch([answer.response_ids for answer in answers])
    finished = sum(answer.is_finished for answer in answers)
    kl = k1(logprobs, worker.ref_logprobs([answer.tree for answer in answers]), mask)
    run.samples(
        [
            {
                "prompt": answer.record.prompt,
                "response": answer.text,
                "score": round(float(score), 4),
                "kl": round(float(nats), 4),
                "tokens": len(answer.response_ids),
            }
            for answer, score, nats in zip(answers, scores, kl.sum(1), strict=True)
        ][: config.num_samples],
        step=number,
    )
    return torch.tensor([scores.sum(), kl.sum(), mask.sum(), finished]).double()
