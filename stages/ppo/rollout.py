"""Make one rollout: sample responses from the policy, then compute rewards and advantages."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from rlhf.generation.answers import Answer, sample_answers
from rlhf.generation.engines import make_engine
from rlhf.generation.interface import Engine
from rlhf.generation.settings import GenerationSettings
from rlhf.inputs.chat import Chat
from rlhf.inputs.fitting import FittedPrompt
from rlhf.inputs.packing import Packer, PromptTree, response_batch
from rlhf.inputs.records import Prompt
from rlhf.maths.advantages import generalized_advantages
from rlhf.maths.kl import penalized_rewards
from rlhf.maths.masking import whiten, whitening_sums
from rlhf.models.passes import compute_logprobs, compute_moments, compute_values
from rlhf.models.scalar import ScalarModel
from rlhf.rewards.load import reward_models_of
from rlhf.rewards.scores import Reward, Scored, adjust_missing_end, clip_scores, penalize_length
from rlhf.runs.stopwatch import Heartbeat, Stopwatch
from rlhf.training.nonfinite import raised_in_all_processes
from rlhf.training.offloading import on_device
from rlhf.training.processes import sum_over_processes
from stages.ppo.config import Config

Gather = Callable[[nn.Module], AbstractContextManager[object]]
"""Returns a context in which this process holds the whole weights of a model or of a part of it. No
other model that is split between processes may run inside. See `Learner.gather`."""


class SamplerCheck(NamedTuple):
    """Holds what the sampler reports and what the policy expects, all (batch, time)."""

    sampler_logprobs: Tensor
    """log-probabilities that the sampler computed while it drew token by token"""
    entropy: Tensor
    """entropy of the policy's distribution at each token, in nats"""
    logprob_variance: Tensor
    """variance of the log-probability of a token drawn from that distribution, in nats^2"""

    def select(self, episodes: Tensor) -> "SamplerCheck":
        return SamplerCheck(*(tensor[episodes] for tensor in self))


@dataclass(frozen=True)
class Rollout:
    """Holds this process's responses and what is known of them before the update.

    Shapes are (batch,) and (batch, time), zero where response_mask is False. The tensors are
    float32 on the CPU.
    """

    trees: list[PromptTree]
    """(batch,) each holds a prompt with its one response"""
    response_mask: Tensor
    """(batch, time) True where the response has a token, the end token included"""
    finished: Tensor
    """(batch,) True where the response has an end token"""
    scores: Tensor
    """(batch,) scores from the reward, after the clip, the length penalty and the treatment of
    missing ends"""
    logprobs: Tensor
    """(batch, time) log-probabilities under the policy that sampled"""
    ref_logprobs: Tensor
    """(batch, time) log-probabilities under the reference policy"""
    values: Tensor
    """(batch, time) values of the state before each token"""
    rewards: Tensor
    """(batch, time) KL penalty on every token, plus the score: on the last token, except for the
    parts that the reward gives to single tokens"""
    advantages: Tensor
    """(batch, time), whitened if the settings say so"""
    returns: Tensor
    """(batch, time), computed from unwhitened advantages"""
    check: SamplerCheck | None = None
    """what the policy's own pass gives besides `logprobs`; None if that pass was skipped, so that
    `logprobs` are the sampler's"""
    parts: Mapping[str, Tensor] = field(default_factory=dict)
    """(batch,) the parts of the score by name, as the reward gave them"""

    def select(self, episodes: Tensor) -> "Rollout":
        """Return a rollout with the chosen episodes only."""
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__}
        trees = [self.trees[i] for i in episodes.tolist()]
        tensors = {k: value[episodes] for k, value in fields.items() if isinstance(value, Tensor)}
        parts = {name: part[episodes] for name, part in self.parts.items()}
        check = None if self.check is None else self.check.select(episodes)
        return Rollout(trees=trees, parts=parts, check=check, **tensors)


@dataclass(frozen=True)
class RolloutWorker:
    """Holds the models of a rollout that do not learn, and runs them."""

    chat: Chat
    ref_policy: PreTrainedModel
    reward: Reward
    packer: Packer
    config: Config
    stopwatch: Stopwatch = field(default_factory=Stopwatch)
    engine: Engine = field(default_factory=lambda: make_engine(GenerationSettings()))
    log: Callable[[str], object] = print
    autocast: Callable[[], AbstractContextManager[object]] = nullcontext
    """context for the reward model, which the launcher does not wrap"""

    def sample(
        self,
        policy: PreTrainedModel,
        prompts: Sequence[FittedPrompt[Prompt]],
        generator: torch.Generator,
    ) -> list[Answer]:
        """Sample one answer to each prompt."""
        settings = self.config.rollout
        with self.stopwatch.phase("rollout"):
            self.engine.refresh(policy)
            answers = sample_answers(
                self.engine,
                prompts,
                self.chat,
                max_new_tokens=settings.max_new_tokens,
                temperature=settings.temperature,
                generator=generator,
                progress=Heartbeat("ppo: sampled", len(prompts), self.log),
            )
            self.engine.release()
            return answers

    @contextmanager
    def sampled(
        self,
        policy: PreTrainedModel,
        prompts: Sequence[FittedPrompt[Prompt]],
        generator: torch.Generator,
        gather: Gather,
        *,
        is_read: bool = True,
    ) -> Iterator[list[Answer]]:
        """Sample one answer to each prompt, and hold the policy whole for passes inside the block.

        All processes must call this, even without prompts. An engine that copies the weights takes
        them one at a time, so the policy is whole only after it has sampled.

        Args:
            is_read: False says that no pass follows, so that the policy need not be whole.
        """
        if self.engine.copies_weights:
            with raised_in_all_processes():
                answers = self.sample(policy, prompts, generator)
            with gather(policy) if is_read else nullcontext():
                yield answers
        else:
            with gather(policy):
                with raised_in_all_processes():
                    answers = self.sample(policy, prompts, generator)
                yield answers

    def raw_scores(self, answers: Sequence[Answer]) -> Scored:
        """Return the scores (batch,) as the reward gives them."""
        with (
            self.stopwatch.phase("score"),
            self.autocast(),
            on_device(reward_models_of(self.reward), self.stopwatch.device, self.config.offload),
        ):
            return self.reward.score(answers)

    def score(self, answers: Sequence[Answer]) -> Scored:
        """Return the scores (batch,) after the clip, the length penalty and missing ends."""
        settings = self.config.reward
        lengths = torch.tensor([len(one.response_ids) for one in answers])
        finished = torch.tensor([one.is_finished for one in answers])
        scored = self.raw_scores(answers)
        scores = clip_scores(scored.scores, settings.clip)
        scores = penalize_length(
            scores, lengths, settings.length_penalty, settings.length_allowance
        )
        scores = adjust_missing_end(
            scores, finished, settings.missing_end, settings.missing_end_value
        )
        return replace(scored, scores=scores)

    def logprobs(self, policy: nn.Module, trees: Sequence[PromptTree]) -> Tensor:
        """Return log-probabilities (batch, time) at the sampling temperature."""
        temperature = self.config.rollout.temperature
        return compute_logprobs(policy, trees, self.packer, temperature=temperature)

    def ref_logprobs(self, trees: Sequence[PromptTree]) -> Tensor:
        """Return `logprobs` of the reference policy."""
        with self.reference_at_hand():
            return self.logprobs(self.ref_policy, trees)

    def reference_at_hand(self) -> AbstractContextManager[None]:
        """Keep the reference policy on the device inside the context."""
        return on_device([self.ref_policy], self.stopwatch.device, self.config.offload)

    @contextmanager
    def teacher(self) -> Iterator[nn.Module | None]:
        """Give the reference, on the device, if ptx.targets names it, and otherwise None."""
        if self.config.ptx.targets == "reference":
            with self.reference_at_hand():
                yield self.ref_policy
        else:
            yield None

    def check(
        self, policy: nn.Module, trees: Sequence[PromptTree], sampler_logprobs: Tensor
    ) -> tuple[Tensor, SamplerCheck]:
        """Return `logprobs`, and what to expect of them if the policy itself drew the tokens."""
        temperature = self.config.rollout.temperature
        moments = compute_moments(policy, trees, self.packer, temperature=temperature)
        check = SamplerCheck(sampler_logprobs, moments.entropy, moments.variance)
        return moments.logprobs, check


def roll_out(
    policy: PreTrainedModel,
    value_model: ScalarModel,
    worker: RolloutWorker,
    prompts: Sequence[FittedPrompt[Prompt]],
    generator: torch.Generator,
    accelerator: Accelerator,
    kl_coef: float | None = None,
    *,
    is_checked: bool = True,
    gather: Gather = nullcontext,
) -> Rollout:
    """Sample, score, subtract the KL penalty, estimate advantages.

    The log-probabilities come from the same packed pass that trains, so the first ratio is 1
    (docs/recipe.md, mistake 13). The sampler's own log-probabilities are only compared with them.

    A process holds the whole weights of one model at a time: the policy's until its
    log-probabilities are known, then those of the frozen models, then the value model's. An engine
    that copies the policy's weights samples before the policy is whole.

    Args:
        kl_coef: penalty for each nat. None means ppo.kl_coef.
        is_checked: False skips that pass and uses the sampler's log-probabilities
            (rollout.check_every).
        gather: gives this process the whole weights of policy and value model, where the launcher
            splits them.
    """
    settings = worker.config.ppo
    kl_coef = settings.kl_coef if kl_coef is None else kl_coef
    check = None
    with worker.sampled(policy, prompts, generator, gather, is_read=is_checked) as answers:
        trees = [answer.tree for answer in answers]
        logprobs = pad_sequence([torch.tensor(one.logprobs) for one in answers], batch_first=True)
        if is_checked:
            with worker.stopwatch.phase("logprobs"):
                logprobs, check = worker.check(policy, trees, logprobs)
    scored = worker.score(answers)
    _, response_mask = response_batch([answer.response_ids for answer in answers])
    with worker.stopwatch.phase("reference"):
        ref_logprobs = worker.ref_logprobs(trees)
    with worker.stopwatch.phase("value"), gather(value_model):
        values = compute_values(value_model, trees, worker.packer)
    with worker.stopwatch.phase("advantages"):
        rewards = penalized_rewards(scored.at_end, logprobs, ref_logprobs, response_mask, kl_coef)
        if scored.token_rewards is not None:
            rewards = rewards + scored.token_rewards
        advantages, returns = generalized_advantages(
            rewards, values, response_mask, gamma=settings.gamma, gae_lambda=settings.gae_lambda
        )
        if settings.whiten_advantages:
            sums = sum_over_processes(accelerator, whitening_sums(advantages, response_mask))
            advantages = whiten(advantages, response_mask, sums)
    return Rollout(
        trees=trees,
        response_mask=response_mask,
        finished=torch.tensor([answer.is_finished for answer in answers]),
        scores=scored.scores,
        logprobs=logprobs,
        ref_logprobs=ref_logprobs,
        values=values,
        rewards=rewards,
        advantages=advantages,
        returns=returns,
        check=check,
        parts=scored.parts,
    )
