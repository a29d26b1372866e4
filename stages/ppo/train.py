"""Run PPO: load, then repeat rollout, update and evaluation, then save."""

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, set_seed
from torch import nn
from tqdm import tqdm

from rlhf.generation.engines import make_engine
from rlhf.inputs.chat import Chat
from rlhf.inputs.files import read_records
from rlhf.inputs.fitting import fit_prompt
from rlhf.inputs.packing import PromptTree, response_batch, text_tree
from rlhf.inputs.records import Prompt, Text, name_rows
from rlhf.inputs.shuffling import ShuffledBatches
from rlhf.inputs.streams import torch_stream
from rlhf.maths.kl import adapt_kl_coef, k1
from rlhf.models.full import checkpoint_activations
from rlhf.models.layout import packer_for
from rlhf.models.limits import check_context, check_vocabulary
from rlhf.models.loading import load_policy, load_scalar
from rlhf.models.saving import save_policy
from rlhf.models.scalar import ScalarModel
from rlhf.models.shared_bases import SharedBases, weight_bytes
from rlhf.models.tokenizers import load_chat
from rlhf.rewards.load import load_reward, reward_models_of
from rlhf.rewards.models import RewardCard, load_value_model
from rlhf.rewards.rendering import same_vocabulary
from rlhf.rewards.scores import Reward
from rlhf.runs.checkpoints import Checkpoints
from rlhf.runs.folder import MODEL_FILES, folders_given_back
from rlhf.runs.run import Run, open_run
from rlhf.runs.stateful import Fields, Generators, Stateful
from rlhf.runs.stopwatch import Stopwatch
from rlhf.training import sharding
from rlhf.training.nonfinite import NonFiniteError, first_nonfinite, found_by_any, told_by_all
from rlhf.training.optim import MovingAverage, make_optimizer, make_schedule
from rlhf.training.processes import (
    max_over_processes,
    naming,
    own_share,
    start_accelerator,
    sum_over_processes,
)
from stages.ppo.config import Config
from stages.ppo.monitor import (
    LAST_GOOD,
    NONFINITE,
    REPLAY_FILE,
    RM_CHANCE,
    TOKEN_NOISE,
    Metrics,
    Monitor,
    TrainingStopped,
    sampler_noise,
    write_replay,
)
from stages.ppo.normalize import normalize_scores
from stages.ppo.rollout import Episode, Rollout, Sampler, roll_out, rollout_metrics, rollout_sums
from stages.ppo.speed import Speedometer
from stages.ppo.update import POLICY, Learner, PolicyAndValue, update


@folders_given_back()
def train(config: Config) -> None:
    """Run PPO from its settings to the saved policy and results.json."""
    accelerator = start_accelerator()
    config.check_launch(accelerator.mixed_precision, accelerator.num_processes)
    token_noise = _token_noise(config, accelerator)
    _check_sampler(config, token_noise)
    monitor = Monitor(config, accelerator.print, token_noise)
    set_seed(config.seed)
    files = (*MODEL_FILES, REPLAY_FILE, LAST_GOOD)
    run = open_run(config, stage="ppo", inputs=_inputs(config), files=files)
    checkpoints = Checkpoints(run, accelerator, config.checkpoint_every, unit="update")
    chat = load_chat(config.policy)
    episodes = _load_episodes(config.prompts, chat, config, accelerator)
    held_out = _load_held_out(chat, config, accelerator)
    watch = Stopwatch(accelerator.device)
    with watch.phase("load"):
        learner, sampler = load_models(config, chat, accelerator, watch)
    _announce(config, accelerator, len(episodes))
    _warn_of_chance(config, monitor)
    before = checkpoints.saved("progress") or {}
    with sharding.whole_weights(accelerator, learner.model):
        sampler, raw_scores = normalize_scores(
            sampler, learner.models.value_model, episodes, accelerator, before.get("raw_scores")
        )

    text_order = shuffled_text(config, chat, accelerator)
    texts = (own_share(accelerator, batch) for batch in text_order)
    order = ShuffledBatches(
        episodes, config.rollout.batch_size, torch_stream(config.seed, "ppo/prompts")
    )
    sampling = torch_stream(config.seed, "ppo/rollouts", accelerator.process_index)
    shuffling = torch_stream(config.seed, "ppo/mini-batches")
    speed = Speedometer(learner.models, sampler, accelerator, config, _dtype(config, accelerator))
    progress = Progress(kl_coef=config.ppo.kl_coef, raw_scores=raw_scores)
    parts: dict[str, Stateful] = {
        "prompts": order,
        "texts": text_order,
        "monitor": monitor,
        "progress": Fields(progress, *vars(progress)),
        "speed": Fields(speed, "totals"),
    }
    own: dict[str, Stateful] = {"generators": Generators(sampling=sampling, shuffling=shuffling)}
    checkpoints.restore(parts | learner.parts(), own)
    first = 0 if checkpoints.step is None else checkpoints.step + 1
    watch.take()  # discard the seconds before the first update
    bar = tqdm(
        range(first, config.num_updates),
        desc="ppo",
        initial=first,
        total=config.num_updates,
        disable=not accelerator.is_main_process,
    )
    started = time.perf_counter()
    for number in bar:
        models = learner.models
        batch = own_share(accelerator, next(order))
        only_value = number < config.ppo.value_warmup_updates
        place = partial(_place, watch, number)
        with _stopping_well(monitor, number, learner, chat, run), naming(accelerator, place):
            with sharding.whole_weights(accelerator, learner.model), accelerator.autocast():
                rollout = roll_out(
                    models.policy,
                    models.value_model,
                    sampler,
                    batch,
                    sampling,
                    accelerator,
                    progress.kl_coef,
                    is_checked=number % config.rollout.check_every == 0,
                )
            with watch.phase("metrics"):
                metrics = _rollout_metrics(rollout, accelerator)
            monitor.watch(number, metrics)
            metrics |= update(
                learner,
                rollout,
                texts,
                config,
                shuffling,
                only_value=only_value,
                look_at_ratio=partial(_watch_ratio, monitor, number, metrics),
            )
            monitor.watch(number, metrics)
        metrics["ppo/kl_coef"] = progress.kl_coef
        metrics["ppo/learning_rate"] = float(learner.schedule.get_last_lr()[0])
        monitor.end_update(metrics)
        if not only_value:
            progress.kl_coef = _next_kl_coef(progress.kl_coef, metrics["ppo/kl"], config)
        if held_out and (number % config.eval_every == 0 or number == config.num_updates - 1):
            whole = sharding.whole_weights(accelerator, learner.model)
            with watch.phase("evaluate"), whole, accelerator.autocast():
                metrics |= evaluate(learner, sampler, held_out, run, number, config)
        seconds = watch.take() | {"update": time.perf_counter() - started}
        started = time.perf_counter()  # the time to save counts for the next update
        metrics |= speed.measure(rollout, metrics, seconds)
        run.alarms(monitor.take_raised())
        run.log(number, metrics | {f"seconds/{name}": value for name, value in seconds.items()})
        bar.set_postfix_str(f"score {metrics['ppo/score']:.2f}, kl {metrics['ppo/kl']:.2f}")
        progress.note(metrics, seconds)
        with watch.phase("save"):
            checkpoints.end_step(number)
    checkpoints.close()

    if learner.average is not None:
        learner.average.copy_to(learner.models.policy)
    save_learned(learner, chat, run.dir)
    results = progress.metrics | speed.mean()
    results = {name.removeprefix("ppo/"): value for name, value in results.items()}
    phases = {name: round(value, 1) for name, value in progress.seconds.items()}
    run.finish(results | raw_scores | {"alarms": monitor.alarms, "phase_seconds": phases})


@dataclass
class Progress:
    """Holds the state of the run outside the learner."""

    kl_coef: float
    """Coefficient of the next update."""
    raw_scores: dict[str, float]
    """Mean and standard deviation before reward.normalize_on; empty without that setting."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Metrics of the last update."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Seconds of all updates, by phase."""

    def note(self, metrics: dict[str, float], seconds: dict[str, float]) -> None:
        """Record an update that is done."""
        self.metrics = metrics
        for name, value in seconds.items():
            self.seconds[name] = self.seconds.get(name, 0.0) + value


def _next_kl_coef(kl_coef: float, kl: float, config: Config) -> float:
    """Adjust the coefficient towards ppo.kl_target; without a target, leave it."""
    if config.ppo.kl_target is None:
        return kl_coef
    return adapt_kl_coef(
        kl_coef,
        kl,
        target=config.ppo.kl_target,
        num_episodes=config.rollout.batch_size,
        horizon=config.ppo.kl_horizon,
    )


@contextmanager
def _stopping_well(
    monitor: Monitor, number: int, learner: Learner, chat: Chat, run: Run
) -> Iterator[None]:
    """Save the weights when an alarm ends the run, and say in the message where they are."""
    try:
        try:
            yield
        except NonFiniteError as error:
            if learner.accelerator.is_main_process:
                write_replay(error, number, chat, run.dir)
            prompt = "" if error.tree is None else f" at prompt {chat.show(error.tree.prompt)!r}"
            cause = f"{error}{prompt} (see {run.dir / REPLAY_FILE})."
            monitor.raise_alarm(NONFINITE, number, cause)
    except TrainingStopped as stop:
        run.alarms(monitor.take_raised())
        run.refresh_page(is_last=True)
        folder = run.dir / LAST_GOOD
        save_learned(learner, chat, folder)
        raise TrainingStopped(f"{stop} The weights before it are in {folder}.") from stop


def _watch_ratio(monitor: Monitor, update: int, metrics: Metrics, largest: float) -> None:
    monitor.watch(update, {**metrics, "ppo/first_log_ratio": largest})


def _place(watch: Stopwatch, update: int) -> str:
    return f"phase {watch.last_phase} of update {update}"


def save_learned(learner: Learner, chat: Chat, folder: Path) -> None:
    """Write the policy as a plain model folder; all processes must call this."""
    accelerator = learner.accelerator
    weights = sharding.whole_state(accelerator, learner.model, "policy")
    if accelerator.is_main_process:
        save_policy(learner.models.policy, chat.tokenizer, folder, weights)
    accelerator.wait_for_everyone()


def _warn_of_chance(config: Config, monitor: Monitor) -> None:
    """Raise an alarm for a reward model that may be no better than a coin.

    The loader refuses such a model unless the settings let it through.
    """
    for path in config.reward.model_paths.values():
        card = RewardCard.load(path)
        low, high = card.interval
        if low <= 0.5:
            cause = (
                f"The reward model at {path} orders {card.pair_accuracy:.1%} of held-out pairs "
                f"right, 95 % interval {low:.1%} to {high:.1%}."
            )
            monitor.raise_alarm(RM_CHANCE, 0, cause)


def _token_noise(config: Config, accelerator: Accelerator) -> float:
    is_half = _dtype(config, accelerator) != torch.float32
    return TOKEN_NOISE["bfloat16" if is_half else "float32"]


def _dtype(config: Config, accelerator: Accelerator) -> torch.dtype:
    """Return the dtype of the matrix products in a forward pass."""
    is_mixed = accelerator.mixed_precision == "bf16"
    return torch.bfloat16 if is_mixed else getattr(torch, config.policy.dtype)


def _load_episodes(
    path: str, chat: Chat, config: Config, accelerator: Accelerator
) -> list[Episode]:
    """Load the prompts that fit; print how many lost early turns and how many were dropped.

    Raises:
        ValueError: no prompt fits.
    """
    max_prompt_tokens = config.rollout.max_prompt_tokens
    episodes = []
    dropped = []
    num_cut = 0
    records = read_records(path, Prompt)
    for record in records:
        prompt = fit_prompt(record, chat, max_prompt_tokens)
        if prompt is None:
            dropped.append(record)
        else:
            num_cut += prompt.is_cut
            episodes.append(Episode(record, prompt.ids))
    if not episodes:
        raise ValueError(
            f"{path}: none of {len(records)} prompts fits in rollout.max_prompt_tokens "
            f"{max_prompt_tokens}; raise it, or give shorter prompts"
        )
    if num_cut or dropped:
        accelerator.print(
            f"ppo: of {len(records)} prompts in {path}, {num_cut} lost early turns and "
            f"{len(dropped)} were dropped{name_rows(dropped)} to fit {max_prompt_tokens} tokens"
        )
    return episodes


def _load_held_out(chat: Chat, config: Config, accelerator: Accelerator) -> list[Episode]:
    if config.prompts_held_out is None:
        return []
    episodes = _load_episodes(config.prompts_held_out, chat, config, accelerator)
    return episodes[: config.num_eval_prompts]


def shuffled_text(
    config: Config, chat: Chat, accelerator: Accelerator
) -> ShuffledBatches[PromptTree]:
    """Give the text blocks of one optimizer step at a time, for all processes; [] without ptx.

    Documents are joined and cut to blocks of `ptx.block_tokens` tokens without a template.
    """
    generator = torch_stream(config.seed, "ppo/text")
    if config.ptx.coef == 0:
        return ShuffledBatches([], 0, generator)
    assert config.ptx.text is not None
    blocks = text_blocks([t.text for t in read_records(config.ptx.text, Text)], chat, config)
    num_processes = accelerator.num_processes
    num_blocks = math.ceil(config.text_blocks_per_step / num_processes) * num_processes
    if num_blocks > len(blocks):
        accelerator.print(
            f"ppo: the text has {len(blocks)} blocks, and an optimizer step takes {num_blocks}: "
            f"each {num_blocks / len(blocks):.1f} times"
        )
    return ShuffledBatches(blocks, num_blocks, generator)


def text_blocks(texts: Sequence[str], chat: Chat, config: Config) -> list[PromptTree]:
    """Join documents, each after the tokenizer's BOS (or EOS) token, and cut them to full blocks.

    Raises:
        ValueError: the text is shorter than one block.
    """
    tokenizer, length = chat.tokenizer, config.ptx.block_tokens
    between = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    ids = []
    for text in texts:
        ids += [between, *chat.bare_text_ids(text)]
    blocks = [ids[i : i + length] for i in range(0, len(ids) - length + 1, length)]
    if not blocks:
        raise ValueError(
            f"{config.ptx.text} holds {len(ids)} tokens, less than one block of ptx.block_tokens "
            f"{length}; give more text or a smaller block"
        )
    return [text_tree(block) for block in blocks]


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
    episodes = own_share(learner.accelerator, held_out)
    sums = torch.zeros(4)
    with told_by_all():
        if episodes:  # with fewer prompts than processes, some processes have none
            sums = _answer(learner, sampler, episodes, run, number, config)
    score, nats, tokens, ended = sum_over_processes(learner.accelerator, sums).tolist()
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
    process = learner.accelerator.process_index
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


def load_models(
    config: Config, chat: Chat, accelerator: Accelerator, watch: Stopwatch
) -> tuple[Learner, Sampler]:
    engine = make_engine(config.generation)
    bases = _shared_bases(config, accelerator)
    policy = load_policy(config.policy, config.lora, bases)
    check_vocabulary(policy, chat, config.policy.path)
    limits = {
        "rollout.max_prompt_tokens": config.rollout.max_prompt_tokens,
        "rollout.max_new_tokens": config.rollout.max_new_tokens,
    }
    check_context(policy, config.policy.path, limits)
    value_model = _load_value_model(config, chat, accelerator, bases)
    resting_device = torch.device("cpu") if config.offload else accelerator.device
    reward = load_reward(
        config.reward, chat, resting_device, config.micro_batch_tokens, accelerator.print, bases
    )
    of_reference = config.policy
    is_bf16 = accelerator.mixed_precision == "bf16"
    if sharding.is_deepspeed(accelerator) and is_bf16 and bases is None:
        # DeepSpeed turns the policy into bfloat16, and the reference must match it.
        of_reference = replace(of_reference, dtype="bfloat16")
    ref_policy = load_policy(of_reference, bases=bases).requires_grad_(False)
    ref_policy.to(resting_device)  # type: ignore[arg-type]  # a wrapper hides the types
    _announce_weights(config, accelerator, [policy, value_model, ref_policy], reward)
    packers = [
        packer_for(policy, config.micro_batch_tokens),
        packer_for(value_model.classifier, config.micro_batch_tokens),
    ]
    # Both models read the same rows, so take the packer that both can read.
    packer = min(packers, key=lambda packer: (packer.share_prompts, packer.use_segments))
    if config.gradient_checkpointing:
        checkpoint_activations(policy)
        checkpoint_activations(value_model.classifier)
    groups = [(policy, config.optim.learning_rate), (value_model, config.value_learning_rate)]
    optimizer = make_optimizer(groups, config.optim)
    first_steps = {POLICY: config.value_warmup_steps}
    schedule = make_schedule(optimizer, config.optim, config.num_steps, first_steps)
    both = PolicyAndValue(policy, value_model)
    model, prepared = sharding.prepare(accelerator, both, optimizer)
    average = None if config.ema_decay is None else MovingAverage(policy, config.ema_decay)
    learner = Learner(model, prepared, schedule, average, packer, accelerator, watch)
    tell = accelerator.print
    autocast = partial(sharding.autocast_unwrapped, accelerator)
    sampler = Sampler(chat, ref_policy, reward, packer, config, watch, engine, tell, autocast)
    return learner, sampler


def _shared_bases(config: Config, accelerator: Accelerator) -> SharedBases | None:
    """Return what lets models share frozen weights, or None where each has weights of its own.

    Without adapters all weights are trained. ZeRO-3 and FSDP split the trained models' weights,
    which frozen models need whole.
    """
    plugin = accelerator.state.deepspeed_plugin
    is_sharded = accelerator.distributed_type == DistributedType.FSDP or (
        plugin is not None and plugin.zero_stage == 3
    )
    if not config.lora.rank or is_sharded:
        return None
    return SharedBases(accelerator.device, config.lora.quantize)


def _announce_weights(
    config: Config, accelerator: Accelerator, roles: Sequence[nn.Module], reward: Reward
) -> None:
    """Print the memory of the weights, and which reward models share none with the policy."""
    reward_models = reward_models_of(reward)
    held = weight_bytes(*roles, *reward_models)
    alone = sum(weight_bytes(model) for model in [*roles, *reward_models])
    accelerator.print(
        f"ppo: weights of policy, value, reference and reward models: {held / 1e6:.1f} MB, "
        f"{alone / 1e6:.1f} MB if each held its own"
    )
    policy = roles[0]
    for path, model in zip(config.reward.model_paths.values(), reward_models, strict=True):
        together = weight_bytes(policy, model)
        if config.lora.rank and together == weight_bytes(policy) + weight_bytes(model):
            accelerator.print(
                f"ppo: the reward model {path} is no adapter over the policy's base in its type "
                "and attention, so its weights are its own"
            )


def _load_value_model(
    config: Config, chat: Chat, accelerator: Accelerator, bases: SharedBases | None
) -> ScalarModel:
    """Start the value model from the reward model (Ouyang et al. 2022, C.4) if there is one.

    Otherwise put a head of zeros on the policy's body. A random head would give a random baseline
    (openai/lm-human-preferences).

    Raises:
        ValueError: the folder that value_model names has another vocabulary than the policy.
    """
    start = config.reward.value_start if config.value_model is None else (config.value_model, 1.0)
    if start is not None:
        path, weight = start
        settings = config.value_settings(path)
        if same_vocabulary(chat, load_chat(settings)):
            value_model = load_value_model(settings, config.lora, bases)
            check_vocabulary(value_model.classifier, chat, path)
            value_model.scale *= weight
            return value_model
        if config.value_model is not None:
            raise ValueError(
                f"value_model {path} has another vocabulary than the policy {config.policy.path}, "
                "whose tokens it must read; give a reward model with the policy's tokenizer, or "
                "null for a new head on the policy's body"
            )
        accelerator.print(
            f"ppo: the reward model {path} has another vocabulary than the policy, so the value "
            "model starts as the policy's body with a new head of zeros"
        )
    value_model = load_scalar(config.policy, new_head=True, lora=config.lora, bases=bases)
    torch.nn.init.zeros_(value_model.head.weight)
    return value_model


def _inputs(config: Config) -> dict[str, str]:
    inputs = {
        "policy": config.policy.path,
        "prompts": config.prompts,
        "prompts_held_out": config.prompts_held_out,
        **{f"reward.{name}": path for name, path in config.reward.model_paths.items()},
        "value_model": config.value_model,
        "text": config.ptx.text if config.ptx.coef else None,
    }
    return {name: path for name, path in inputs.items() if path is not None}


def _rollout_metrics(rollout: Rollout, accelerator: Accelerator) -> dict[str, float]:
    """Compute the rollout's metrics over all processes.

    Raises:
        NonFiniteError: a value of the rollout is not finite; all processes raise it.
    """
    sums = rollout_sums(rollout)
    totals = {name: float(sum_over_processes(accelerator, value)) for name, value in sums.items()}
    if not all(math.isfinite(total) for total in totals.values()):
        fields = vars(rollout) | ({} if rollout.check is None else rollout.check._asdict())
        tensors = {k: v for k, v in fields.items() if isinstance(v, torch.Tensor)}
        found = found_by_any(first_nonfinite(tensors, rollout.trees, "rollout"))
        raise found or NonFiniteError("a sum over the tokens", "rollout")
    largest = {"ppo/max_token_kl": rollout.logprobs - rollout.ref_logprobs}
    if rollout.check is not None:
        largest["ppo/sampler_difference"] = rollout.logprobs - rollout.check.sampler_logprobs
    return rollout_metrics(totals) | {
        name: max_over_processes(accelerator, difference.abs().max().item())
        for name, difference in largest.items()
    }


def _check_sampler(config: Config, token_noise: float) -> None:
    """Refuse to use the log-probabilities of a sampler whose noise reaches the clip range.

    Raises:
        ValueError: rollout.check_every is above 1 with such a sampler.
    """
    noise = sampler_noise(config, token_noise)
    if config.rollout.check_every > 1 and noise >= config.ppo.clip_range:
        raise ValueError(
            f"rollout.check_every is {config.rollout.check_every}, but sampler and trainer may "
            f"differ by {noise:g} nats a token here, and ppo.clip_range is "
            f"{config.ppo.clip_range:g}; give 1, or sample with hf in float32"
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
