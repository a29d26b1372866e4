"""Set up a run: read its inputs, load its models, and continue from its checkpoint."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed

from rlhf.inputs.chat import Chat
from rlhf.inputs.fitting import FittedPrompt
from rlhf.inputs.packing import PromptTree
from rlhf.inputs.records import Prompt
from rlhf.inputs.shuffling import ShuffledBatches
from rlhf.inputs.streams import torch_stream
from rlhf.models.one_copy import converted_once
from rlhf.models.tokenizers import load_chat
from rlhf.rewards.models import RewardCard
from rlhf.runs.checkpoints import Checkpoints
from rlhf.runs.folder import MODEL_FILES
from rlhf.runs.run import Run, open_run
from rlhf.runs.stateful import Fields, Generators, Stateful, parts_of
from rlhf.runs.stopwatch import Stopwatch
from rlhf.training.processes import own_share, start_accelerator, warn_of_float32
from stages.ppo.config import Config
from stages.ppo.data import inputs_of, load_held_out, load_prompts, shuffled_text
from stages.ppo.learner import Learner
from stages.ppo.load import load_models
from stages.ppo.monitor import (
    LAST_GOOD,
    POLICIES,
    REPLAY_FILE,
    RM_CHANCE,
    TOKEN_NOISE,
    Monitor,
    Noise,
    sampler_noise,
)
from stages.ppo.normalize import normalize_scores
from stages.ppo.progress import Progress
from stages.ppo.rollout import RolloutWorker
from stages.ppo.speed import Speedometer

FILES = (*MODEL_FILES, REPLAY_FILE, LAST_GOOD, POLICIES)
"""Files and folders that PPO writes besides those of every run."""


@dataclass(frozen=True)
class Setup:
    """Holds everything that the updates of a run use."""

    accelerator: Accelerator
    run: Run
    checkpoints: Checkpoints
    monitor: Monitor
    chat: Chat
    prompts: ShuffledBatches[FittedPrompt[Prompt]]
    """the prompts of an update, for all processes"""
    held_out: list[FittedPrompt[Prompt]]
    texts: Iterator[list[PromptTree]]
    """the text blocks of an optimizer step, for this process; empty lists without ptx"""
    learner: Learner
    worker: RolloutWorker
    sampling: torch.Generator
    """draws tokens; each process has its own"""
    shuffling: torch.Generator
    """draws the order of episodes; the same on all processes"""
    progress: Progress
    speed: Speedometer
    stopwatch: Stopwatch

    @property
    def next_update(self) -> int:
        """The first update to do: 0, or the one after the checkpoint's."""
        return 0 if self.checkpoints.step is None else self.checkpoints.step + 1


def set_up(config: Config) -> Setup:
    """Read inputs, load models, and restore what a checkpoint of this run holds."""
    accelerator = start_accelerator()
    warn_of_float32(accelerator, config.policy.dtype)
    config.check_launch(accelerator.mixed_precision, accelerator.num_processes)
    token_noise = _token_noise(config, accelerator)
    _check_sampler(config, token_noise)
    monitor = Monitor(config, accelerator.print, token_noise)
    set_seed(config.seed)
    run = open_run(config, stage="ppo", inputs=inputs_of(config), files=FILES)
    checkpoints = Checkpoints(run, accelerator, config.checkpoint_every, unit="update")
    chat = load_chat(config.policy)
    prompts = load_prompts(config.prompts, chat, config, accelerator)
    held_out = load_held_out(chat, config, accelerator)
    stopwatch = Stopwatch(accelerator.device)
    with stopwatch.phase("load"), converted_once(accelerator):
        learner, worker = load_models(config, chat, accelerator, stopwatch)
    _announce(config, accelerator, len(prompts))
    _warn_of_chance(config, monitor)
    before = checkpoints.saved("progress") or {}
    worker, raw_scores = normalize_scores(
        worker,
        learner.models.value_model,
        prompts,
        accelerator,
        before.get("raw_scores"),
        gather=learner.gather,
    )
    text_order = shuffled_text(config, chat, accelerator)
    texts = (own_share(accelerator, batch) for batch in text_order)
    order = ShuffledBatches(
        prompts, config.rollout.batch_size, torch_stream(config.seed, "ppo/prompts")
    )
    sampling = torch_stream(config.seed, "ppo/rollouts", accelerator.process_index)
    shuffling = torch_stream(config.seed, "ppo/mini-batches")
    speed = Speedometer(learner.models, worker, accelerator, config, _dtype(config, accelerator))
    progress = Progress(kl_coef=config.ppo.kl_coef, raw_scores=raw_scores)
    parts: dict[str, Stateful] = {
        "prompts": order,
        "texts": text_order,
        "monitor": monitor,
        "progress": Fields(progress, *vars(progress)),
        "speed": Fields(speed, "totals"),
    }
    own: dict[str, Stateful] = {"generators": Generators(sampling=sampling, shuffling=shuffling)}
    trained = parts_of(learner.state)
    checkpoints.restore(parts | trained.shared, own | trained.own)
    stopwatch.take()  # discard the seconds before the first update
    return Setup(
        accelerator=accelerator,
        run=run,
        checkpoints=checkpoints,
        monitor=monitor,
        chat=chat,
        prompts=order,
        held_out=held_out,
        texts=texts,
        learner=learner,
        worker=worker,
        sampling=sampling,
        shuffling=shuffling,
        progress=progress,
        speed=speed,
        stopwatch=stopwatch,
    )


def _announce(config: Config, accelerator: Accelerator, num_prompts: int) -> None:
    """Print the batch sizes in words, since every system means something else by them."""
    episodes = config.num_updates * config.rollout.batch_size
    accelerator.print(
        f"ppo: {num_prompts} prompts; {config.rollout.batch_size} episodes an update, "
        f"{config.steps_per_update} optimizer steps an update of {config.ppo.mini_batch_size} "
        f"episodes each, {config.num_updates} updates: {config.num_steps} steps, {episodes} "
        f"episodes, {episodes / num_prompts:.1f} passes over the prompts"
    )
    if config.rollout.batch_size > num_prompts:
        accelerator.print(
            f"ppo: {num_prompts} prompts fill a rollout.batch_size of {config.rollout.batch_size}: "
            f"each is answered {config.rollout.batch_size / num_prompts:.1f} times an update"
        )


def _check_sampler(config: Config, token_noise: Noise) -> None:
    """Refuse to use the log-probabilities of a sampler whose noise reaches the clip range.

    Raises:
        ValueError: rollout.check_every is above 1 with such a sampler.
    """
    noise = sampler_noise(config, token_noise).high
    if config.rollout.check_every > 1 and noise >= config.ppo.clip_range:
        raise ValueError(
            f"rollout.check_every is {config.rollout.check_every}, but sampler and trainer may "
            f"differ by {noise:g} nats a token here, and ppo.clip_range is "
            f"{config.ppo.clip_range:g}; give 1, or sample with hf in float32"
        )


def _warn_of_chance(config: Config, monitor: Monitor) -> None:
    """Raise an alarm for a reward model that may be no better than a coin.

    The loader refuses such a model unless the settings let it through.
    """
    for path in config.reward.model_paths.values():
        card = RewardCard.load(path)
        low, high = card.interval
        if low <= 0.5:
            found = (
                f"The reward model at {path} orders {card.pair_accuracy:.1%} of held-out pairs "
                f"right, 95 % interval {low:.1%} to {high:.1%}."
            )
            monitor.raise_alarm(RM_CHANCE, found)


def _token_noise(config: Config, accelerator: Accelerator) -> Noise:
    is_half = _dtype(config, accelerator) != torch.float32
    return TOKEN_NOISE["bfloat16" if is_half else "float32"]


def _dtype(config: Config, accelerator: Accelerator) -> torch.dtype:
    """Return the dtype of the matrix products in a forward pass."""
    is_mixed = accelerator.mixed_precision == "bf16"
    return torch.bfloat16 if is_mixed else getattr(torch, config.policy.dtype)
