"""Compute the bytes and seconds that a run will need, before anything is loaded.

    python -m tools.plan --config configs/ppo/tiny.yaml [--accelerate FILE] [--KEY VALUE]...

It reads only config.json of each model. The peak of a phase has three parts: what is held all the
time, what is held in this phase, and the most that its passes allocate.

    held       weights of all models; a base under several of PPO's adapters counts once;
               Adam's two moments of each trained weight, in its type; the moving average, fp32;
               the buffers in which several processes exchange gradients
    train      gradients of both models; the text's gradients if they are measured; a forward and
               backward pass over a row of micro_batch_tokens (rlhf/measuring/allocations.py),
               through one model at a time if there is one process
    ptx        gradients of the policy, and such a pass through it alone over text
    step       gradients, the text's too; then the larger of two: PPO's own gradients to compare
               with the text's, or the optimizer's temporaries. On a CPU these are two copies of
               the largest weight. A GPU steps all weights of a model at once, and copies each
    rollout    prompts of max_prompt_tokens read at once, or the last step with the whole cache
    others     a pass without gradient over a row of micro_batch_tokens

Under DDP every process holds all of this. ZeRO-2 splits optimizer and gradients over the processes;
ZeRO-3 and FSDP2 also split the trained weights and the moving average. With mixed precision,
DeepSpeed turns the models into bfloat16 and keeps fp32 weights besides; FSDP2 keeps fp32 weights
only, and gathers them in bfloat16. Both hold the reference in bfloat16.

In a rollout every process gathers the policy until its log-probabilities are known, and later the
value model. In training FSDP2 gathers layer by layer, and ZeRO-3 up to 1e9 weights. tools/launch.py
has these rules, and the buffers through which gradients go. tests/tools/test_plan.py compares the
plan with real runs, in one process and in two, under each launcher.
GPUs were never measured. Lengths are the settings' limits, so shorter data need less in
the rollout, and less time.
"""

import argparse
import math
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn
from transformers import PreTrainedModel

from rlhf.inputs.packing import Layout, PackedRow, Packer, PromptTree, text_tree
from rlhf.maths.logprobs import CHUNK_TOKENS
from rlhf.measuring.allocations import DryRun
from rlhf.measuring.flops import (
    Work,
    forward_flops,
    size_of,
    text_work,
    training_flops,
    update_flops,
    work_of,
)
from rlhf.models.adapters import CONFIG_FILE, adapter_weights
from rlhf.models.full import checkpoint_activations
from rlhf.models.scalar import ScalarModel
from rlhf.models.settings import ModelSettings
from rlhf.rewards.models import measured_dtype
from rlhf.runs.program import run_stage
from rlhf.runs.settings import config_files
from rlhf.runs.stopwatch import matrix_rate
from rlhf.training.parameters import trained_parameters
from stages.ppo.config import Config as PPOConfig
from stages.rm.config import Config as RMConfig
from stages.sft.config import Config as SFTConfig
from tools.launch import Launch, bytes_of

Config = PPOConfig | RMConfig | SFTConfig
STAGES: dict[str, Any] = {"ppo": PPOConfig, "rm": RMConfig, "sft": SFTConfig}
TYPES = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}


Turn = tuple[PreTrainedModel | None, ScalarModel | None]
"""The models of a pass."""


@dataclass
class Plan:
    """Bytes of one process, and the FLOPs of its work."""

    launch: Launch
    split: list[nn.Module] = field(default_factory=list)
    """The trained models, which the launcher may split."""
    held: dict[str, int] = field(default_factory=dict)
    """Bytes held all the time, on the device."""
    waiting: dict[str, int] = field(default_factory=dict)
    """Bytes in CPU memory between uses."""
    parts: dict[str, int] = field(default_factory=dict)
    """The largest parts of what the phases need."""
    phases: dict[str, int] = field(default_factory=dict)
    """Peak of each phase, including all that is held."""
    work: str = "an update"
    """The work that the FLOPs are for."""
    flops: dict[str, float] = field(default_factory=dict)
    """FLOPs by phase."""

    @property
    def peak(self) -> int:
        return max(self.phases.values())

    def add_phase(self, name: str, *parts: int) -> None:
        """Add a phase that needs these parts together. If added twice, the larger need counts."""
        needed = sum(self.held.values()) + sum(parts)
        self.phases[name] = max(needed, self.phases.get(name, 0))

    def hold(self, name: str, model: nn.Module, dtype: torch.dtype) -> None:
        """Add the weights of a trained model, whose files are loaded in this type."""
        self.held[f"{name}: weights"] = self.launch.weights(model, dtype)

    def hold_on_base(self, name: str, model: PreTrainedModel) -> None:
        """Add the weights of a role: its adapter and head, and the base below them.

        Roles over the same base share it (`rlhf.models.shared_bases`)."""
        own = sum(weight.nbytes for weight in adapter_weights(model).values())
        base = f"base {model.config.name_or_path}, {str(model.dtype).removeprefix('torch.')}"
        size = (bytes_of(model.parameters()) - own) // (1 + self.launch.is_halved)
        self.held[base] = max(self.held.get(base, 0), size)  # a classifier lacks the unembedding
        if own:
            self.held[f"{name}: adapter and head"] = own

    def hold_optimizer(self, name: str, model: nn.Module) -> None:
        """Add a model's optimizer states."""
        self.held[f"{name}: optimizer"] = self.launch.optimizer(model)

    def hold_exchange(self, *models: nn.Module) -> None:
        """Add the buffers of the exchange of gradients, and gradients that are never freed."""
        self.split = list(models)
        if buffers := self.launch.exchange(*models):
            self.held["exchange of gradients"] = buffers
        if self.launch.keeps_gradients:
            self.held["gradients"] = sum(self.launch.gradients(model) for model in models)

    def gradients(self, *models: nn.Module) -> int:
        """Return the bytes of gradients between passes, unless they are held all the time."""
        is_held = self.launch.keeps_gradients
        return 0 if is_held else sum(self.launch.gradients(model) for model in models)

    def add_pass(
        self,
        phase: str,
        dry: DryRun,
        row: PackedRow,
        turn: Turn,
        existing: Sequence[nn.Module],
        *others: int,
    ) -> int:
        """Add a forward and backward pass of a row through one or both models; return its bytes.

        Args:
            existing: Models that have gradients already.
            others: Bytes of what is held besides.
        """
        models = [model for model in turn if model is not None]

        def run(accumulates: Sequence[nn.Module]) -> int:
            return dry.training(row, *turn, accumulates)

        return self.add_pass_of(phase, run, models, existing, *others)

    def add_pass_of(
        self,
        phase: str,
        run: Callable[[Sequence[nn.Module]], int],
        models: Sequence[nn.Module],
        existing: Sequence[nn.Module],
        *others: int,
    ) -> int:
        """Add a pass with gradient through these models, which `run` measures; return its bytes."""
        before = existing
        if self.launch.splits_gradients:
            # A whole gradient is gone when its shards are exchanged, so only those are left.
            before = list({*existing, *models})
        own = run([model for model in models if model in before])
        a_pass = self.launch.training_pass(own, models, self.split)
        self.add_phase(phase, self.gradients(*before), *others, a_pass)
        return a_pass


def make_plan(config: Config, launch: Launch) -> Plan:
    """Make the plan of a stage's settings.

    Raises:
        ValueError, OSError: A model's config cannot be read, an adapter does not fit the settings,
            weights are to be quantized, or the stage would refuse the launcher.
    """
    if config.lora.rank and config.lora.quantize != "none":
        raise ValueError(
            f"lora.quantize is {config.lora.quantize}, and the plan knows no quantized weights; "
            "give --lora.quantize none for what the run would need without, which is more"
        )
    dry, plan = DryRun(TYPES[launch.mixed_precision]), Plan(launch)
    try:
        if isinstance(config, PPOConfig):
            config.check_launch(launch.mixed_precision, launch.num_processes)
            _plan_ppo(plan, dry, config)
        elif isinstance(config, RMConfig):
            _plan_rm(plan, dry, config)
        else:
            _plan_sft(plan, dry, config)
    except (ValueError, OSError):
        raise
    except Exception as error:  # an architecture may fail in any way on tensors without data
        path = config.policy.path if isinstance(config, PPOConfig) else config.model.path
        raise ValueError(
            f"{path} cannot be planned: its architecture cannot be run without data "
            f"({type(error).__name__}: {' '.join(str(error).split())[:150]}); mixtures of experts "
            "and state space models are among these. Try a short run instead: num_updates or "
            "num_epochs 1"
        ) from error
    return plan


@dataclass(frozen=True)
class Roles:
    """PPO's models, without data."""

    policy: PreTrainedModel
    value_model: ScalarModel
    reference: PreTrainedModel
    rewards: dict[str, ScalarModel]
    are_shared: bool
    """Whether they are adapters over common bases (`stages.ppo.load.load_models`)."""

    @classmethod
    def of(cls, config: PPOConfig, dry: DryRun, launch: Launch) -> "Roles":
        are_shared = config.lora.rank > 0 and not launch.splits_weights
        # A base that adapters share keeps its type here; hold_on_base halves its bytes.
        in_passes = Launch() if are_shared else launch
        settings = _dry(config.policy, in_passes)
        rewards = {
            name: dry.scalar(_dry(_reward_settings(config, path), Launch()), is_shared=are_shared)
            for name, path in config.reward.model_paths.items()
        }
        roles = cls(
            dry.policy(settings, config.lora, is_shared=are_shared),
            dry.scalar(_dry(_value_settings(config), in_passes), config.lora, is_shared=are_shared),
            dry.policy(settings, is_shared=are_shared),
            rewards,
            are_shared,
        )
        if config.gradient_checkpointing:
            checkpoint_activations(roles.policy)
            checkpoint_activations(roles.value_model.classifier)
        return roles


def _plan_ppo(plan: Plan, dry: DryRun, config: PPOConfig) -> None:
    roles = Roles.of(config, dry, plan.launch)
    _hold_roles(plan, roles, config)
    _plan_rollout(plan, dry, config, roles)
    _plan_training(plan, dry, config, roles.policy, roles.value_model)
    num_episodes = config.rollout.batch_size // plan.launch.num_processes
    num_texts = math.ceil(config.text_blocks_per_step / plan.launch.num_processes)
    episodes = work_of([_tree(*_lengths(config))]) * num_episodes
    texts = text_work(config.ptx.block_tokens) * (num_texts * config.steps_per_update)
    policy, value_model = size_of(roles.policy), size_of(roles.value_model.classifier)
    plan.flops = update_flops(
        policy,
        value_model,
        [size_of(model.classifier) for model in roles.rewards.values()],
        episodes,
        texts,
        config.ppo.num_epochs,
    )
    plan.flops["logprobs"] /= config.rollout.check_every  # the mean over updates
    if config.gradient_checkpointing:
        again = forward_flops(policy, episodes) + forward_flops(value_model, episodes)
        plan.flops["ptx"] += forward_flops(policy, texts)
        plan.flops["train"] += config.ppo.num_epochs * again


def _hold_roles(plan: Plan, roles: Roles, config: PPOConfig) -> None:
    launch = plan.launch
    trained = {"policy": roles.policy, "value model": roles.value_model.classifier}
    types = {"policy": config.policy.dtype, "value model": _value_settings(config).dtype}
    frozen = {"reference": roles.reference}
    frozen |= {f"reward.{name}": model.classifier for name, model in roles.rewards.items()}
    if roles.are_shared:
        for name, model in (trained | frozen).items():
            plan.hold_on_base(name, model)
    for name, model in trained.items():
        if not roles.are_shared:
            plan.hold(name, model, getattr(torch, types[name]))
        plan.hold_optimizer(name, model)
    plan.hold_exchange(*trained.values())
    if config.ema_decay is not None:
        average = bytes_of(trained_parameters(roles.policy).values(), as_type=torch.float32)
        plan.held["policy: moving average"] = launch.share(average, launch.splits_weights)
    if not roles.are_shared:
        resting = plan.waiting if config.offload and launch.device != "cpu" else plan.held
        resting |= {name: bytes_of(model.parameters()) for name, model in frozen.items()}


def _plan_rollout(plan: Plan, dry: DryRun, config: PPOConfig, roles: Roles) -> None:
    """Add sampling and passes without gradient. Offloaded models return for their phase.

    A process holds one split model at a time (`stages.ppo.rollout.roll_out`)."""
    num_episodes = config.rollout.batch_size // plan.launch.num_processes
    batch = min(config.generation.batch_size, num_episodes)
    sampling, cache = dry.sampling(roles.policy, batch, *_lengths(config))
    plan.parts["KV cache of a rollout"] = cache
    row = _rows(config, plan.launch).of_episodes(*_lengths(config), num_episodes)
    of_policy = plan.launch.gathered(roles.policy, roles.value_model)
    of_value = plan.launch.gathered(roles.value_model, roles.policy)
    plan.parts["weights gathered to sample"] = of_policy
    plan.parts["weights gathered for values"] = of_value
    plan.add_phase("rollout", of_policy, sampling)
    plan.add_phase("logprobs", of_policy, dry.moments(roles.policy, row))
    if roles.rewards:  # the phase brings all of them to the device
        visitors = sum(plan.waiting.get(f"reward.{name}", 0) for name in roles.rewards)
        passes = [dry.values(model, row) for model in roles.rewards.values()]
        plan.add_phase("score", visitors, max(passes))
    visitor = plan.waiting.get("reference", 0)
    plan.add_phase("reference", visitor, dry.logprobs(roles.reference, row))
    plan.add_phase("value", of_value, dry.values(roles.value_model, row))


def _plan_training(
    plan: Plan, dry: DryRun, config: PPOConfig, policy: PreTrainedModel, value_model: ScalarModel
) -> None:
    """Add the passes with gradient, over episodes and over text, and the optimizer's step."""
    launch, budget = plan.launch, config.micro_batch_tokens
    rows = _rows(config, launch)
    own_step = config.ppo.mini_batch_size // launch.num_processes
    own_blocks = math.ceil(config.text_blocks_per_step / launch.num_processes)
    row = rows.of_episodes(*_lengths(config), own_step)
    is_watched = config.ptx.gradient_norms or config.ptx.grad_norm_ratio is not None
    # Sharded gradients of the text are set aside even if nothing is measured.
    is_kept = is_watched or launch.splits_gradients
    of_text = launch.set_aside(policy) if own_blocks and is_kept else 0
    if own_blocks:
        blocks = rows.of_texts(config.ptx.block_tokens, own_blocks)
        is_one_row = own_blocks * config.ptx.block_tokens <= budget
        plan.add_pass("ptx", dry, blocks, (policy, None), [] if is_one_row else [policy])
    is_one_row = own_step * sum(_lengths(config)) <= budget
    existing: list[nn.Module] = [policy] if own_blocks else []
    if not is_one_row:
        existing = [policy, value_model]
    turns: list[Turn] = [(policy, value_model)]
    if launch.is_alone:
        turns = [(policy, None), (None, value_model)]
    passes = []
    for turn in turns:
        passes.append(plan.add_pass("train", dry, row, turn, existing, of_text))
        existing = list({*existing, policy})
    comparing = of_text + _largest(policy) if of_text else 0
    kept = plan.gradients(policy, value_model)
    plan.add_phase("step", kept, of_text, max(comparing, launch.step(policy, value_model)))
    plan.parts |= {
        "gradients of policy and value model": kept,
        "gradients of the text": of_text,
        f"pass of {row.input_ids.numel()} tokens, forward and backward": max(passes),
        "  of it logits at a time": _logits_bytes(policy, min(CHUNK_TOKENS, len(row.targets))),
    }


def _plan_rm(plan: Plan, dry: DryRun, config: RMConfig) -> None:
    """Plan a pass over a full row. A longer ranking is not cut, and needs more."""
    model = dry.scalar(_dry(config.model, plan.launch), config.lora)
    if config.gradient_checkpointing:
        checkpoint_activations(model.classifier)
    plan.hold("reward model", model, getattr(torch, config.model.dtype))
    plan.hold_optimizer("reward model", model)
    plan.hold_exchange(model)
    lengths = config.max_prompt_tokens, config.max_response_tokens
    rows = Rows(config.model, config.micro_batch_tokens, plan.launch.device)
    row = rows.of_episodes(*lengths, config.batch_size)
    gradients = plan.gradients(model)
    a_pass = plan.add_pass("train", dry, row, (None, model), [model])
    plan.add_phase("step", gradients, plan.launch.step(model))
    num_tokens = row.input_ids.numel()
    plan.parts |= {
        "gradients": gradients,
        f"pass of {num_tokens} tokens, forward and backward": a_pass,
    }
    plan.work = f"a pass of {num_tokens} tokens"
    work = work_of([_tree(*lengths)]) * max(1, num_tokens // sum(lengths))
    plan.flops["train"] = _training_flops(model.classifier, work, config)


def _plan_sft(plan: Plan, dry: DryRun, config: SFTConfig) -> None:
    """Plan a padded batch with all of its logits, as TRL trains."""
    policy = dry.policy(_dry(config.model, plan.launch), config.lora)
    plan.hold("policy", policy, getattr(torch, config.model.dtype))
    plan.hold_optimizer("policy", policy)
    plan.hold_exchange(policy)
    if config.reward_model is not None:
        path = _with_config(config.reward_model, config.model.path)
        plan.held["reward model"] = bytes_of(dry.scalar(ModelSettings(path=path)).parameters())
    prompt, response = config.max_prompt_tokens, config.max_response_tokens
    batch = min(config.generation.batch_size, config.num_samples)
    sampling, plan.parts["KV cache of the samples"] = dry.sampling(policy, batch, prompt, response)
    gathered = plan.launch.gathered(policy)
    plan.parts["weights gathered for samples"] = gathered
    plan.add_phase("samples", gathered, sampling)
    if config.gradient_checkpointing:
        checkpoint_activations(policy)
    rows = config.rows_per_pass(plan.launch.num_processes)
    length = prompt + response
    gradients = plan.gradients(policy)
    existing = [policy] if config.batch_size > rows * plan.launch.num_processes else []
    a_pass = plan.add_pass_of(
        "train", lambda kept: dry.batch_training(policy, rows, length, kept), [policy], existing
    )
    plan.add_phase("step", gradients, plan.launch.step(policy))
    plan.parts |= {
        "gradients": gradients,
        f"pass of {rows} x {length} tokens, forward and backward": a_pass,
        "  of it logits": _logits_bytes(policy, rows * length),
    }
    plan.work = "an optimizer step"
    own_rows = config.batch_size // plan.launch.num_processes
    work = Work(length, length, text_work(length).pairs) * own_rows
    plan.flops["train"] = _training_flops(policy, work, config)


def _reward_settings(config: PPOConfig, path: str) -> ModelSettings:
    return ModelSettings(
        path=_with_config(path, config.policy.path),
        dtype=measured_dtype(path) if config.reward.dtype == "measured" else config.reward.dtype,
        attention=config.reward.attention,
        trust_remote_code=config.reward.trust_remote_code,
    )


def _value_settings(config: PPOConfig) -> ModelSettings:
    """Return the value model's settings as the run would use them, with one exception.

    If a reward model has another vocabulary than the policy, the run takes the policy's body. The
    plan does not know vocabularies."""
    start = config.reward.value_start
    path = config.value_model or (None if start is None else start[0])
    if path is None or _with_config(path, config.policy.path) == config.policy.path:
        return config.policy
    return config.value_settings(path)


def _with_config(path: str, other: str) -> str:
    """Return a path that holds a config, or `other` for a reward model that is not yet trained."""
    files = ("config.json", CONFIG_FILE)
    return path if any((Path(path) / name).is_file() for name in files) else other


def _dry(settings: ModelSettings, launch: Launch) -> ModelSettings:
    """Return a model's settings as its passes use them.

    Flash attention and FlexAttention have no kernel here; sdpa without a mask saves the same
    tensors."""
    if launch.is_halved:
        settings = replace(settings, dtype="bfloat16")
    has_kernel = settings.attention in ("sdpa", "eager")
    return settings if has_kernel else replace(settings, attention="sdpa")


def _tree(prompt: int, response: int) -> PromptTree:
    return PromptTree((0,) * prompt, ((0,) * response,))


def _lengths(config: PPOConfig) -> tuple[int, int]:
    """Return the most tokens of a prompt and of a response."""
    return config.rollout.max_prompt_tokens, config.rollout.max_new_tokens


def _rows(config: PPOConfig, launch: Launch) -> "Rows":
    return Rows(config.policy, config.micro_batch_tokens, launch.device)


@dataclass(frozen=True)
class Rows:
    """The fullest rows that a model gets."""

    settings: ModelSettings
    budget: int
    """The most tokens in a row."""
    device: str

    def of_episodes(self, prompt: int, response: int, num_trees: int) -> PackedRow:
        """Make a row of trees of the largest size, and a smaller one that fills the rest."""
        num_whole = max(1, min(self.budget // (prompt + response), num_trees))
        trees = [_tree(prompt, response)] * num_whole
        left = self.budget - num_whole * (prompt + response)
        if left > 1 and num_whole < num_trees:
            trees.append(_tree(max(1, left - response), min(response, left - 1)))
        return self._lay(trees)

    def of_texts(self, block: int, num_blocks: int) -> PackedRow:
        """Make a row of blocks of text."""
        return self._lay([text_tree([0] * block)] * max(1, min(self.budget // block, num_blocks)))

    def _lay(self, trees: Sequence[PromptTree]) -> PackedRow:
        is_flash = self.settings.attention == "flash_attention_2"
        layout = Layout.SEQUENCES if is_flash else Layout.MASK
        row, *_ = Packer(self.budget, layout).rows(trees)
        # With segments, as without a mask, attention saves only queries, keys and values. A block
        # mask holds a few numbers for each 128 tokens.
        has_segments = self.device == "cpu" and self.settings.attention == "sdpa"
        has_blocks = self.settings.attention == "flex_attention"
        return replace(row, plain=row.plain or is_flash or has_segments or has_blocks)


def _largest(model: nn.Module) -> int:
    return max(p.nbytes for p in trained_parameters(model).values())


def _training_flops(model: PreTrainedModel, work: Work, config: RMConfig | SFTConfig) -> float:
    size = size_of(model)
    again = forward_flops(size, work) if config.gradient_checkpointing else 0.0
    return training_flops(size, work) + again


def _logits_bytes(policy: nn.Module, tokens: int) -> int:
    # 4 bytes, because logits are computed in fp32.
    return 4 * tokens * policy.get_output_embeddings().weight.shape[0]  # type: ignore[operator]


def show(plan: Plan, rate: float, dtype: torch.dtype) -> str:
    """Format the plan as a table."""
    launch = plan.launch
    split = f", {launch.name}" if launch.name else ""
    each = (
        "one process" if launch.num_processes == 1 else f"each of {launch.num_processes} processes"
    )
    lines = [f"plan for {each} on {launch.device}, mixed precision {launch.mixed_precision}{split}"]

    def add(title: str, rows: dict[str, int], marked: int | None = None) -> None:
        lines.extend(["", title] if rows else [])
        for name, value in rows.items():
            mark = "  <- peak" if value == marked else ""
            lines.append(f"  {name:<46}{value / 1e6:>12,.1f} MB{mark}")

    add("held all the time", plan.held | {"together": sum(plan.held.values())})
    add("waiting in CPU memory", plan.waiting)
    add("what phases need besides", {name: size for name, size in plan.parts.items() if size})
    add("peak of each phase, all in all", plan.phases, plan.peak)
    lines += ["", f"seconds of {plan.work}, at the matrix rate of this machine (an estimate: "]
    lines[-1] += f"{rate / 1e9:,.0f} GFLOPS in {str(dtype).removeprefix('torch.')})"
    seconds = {name: flops / rate for name, flops in plan.flops.items() if flops}
    for name, value in (seconds | {"together": sum(seconds.values())}).items():
        lines.append(f"  {name:<46}{value:>12,.3f} s")
    lines.append("  a lower bound: no pass reaches the rate, and sampling waits for memory")
    return "\n".join(lines)


def main(args: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        usage="python -m tools.plan --config FILE [--accelerate FILE] [--KEY VALUE]...",
        description="Memory and time that a run will need; other options are the stage's own.",
        allow_abbrev=False,
        add_help=False,
    )
    parser.add_argument("--stage", choices=STAGES)
    parser.add_argument("--accelerate", type=lambda path: Path(os.path.expanduser(path)))
    own, words = parser.parse_known_args(args)
    if not words or words == ["--help"]:
        parser.print_help()
        parser.exit()

    def tell(config: Any) -> None:
        launch = Launch.read(own.accelerate)
        plan = make_plan(config, launch)
        model = config.policy if isinstance(config, PPOConfig) else config.model
        dtype = TYPES[launch.mixed_precision] or getattr(torch, model.dtype)
        is_here = launch.device == "cuda" and torch.cuda.is_available()
        device = torch.device("cuda" if is_here else "cpu")
        print(show(plan, matrix_rate(device, dtype), dtype), flush=True)

    run_stage(tell, STAGES[own.stage or _stage_of(words)], words)


def _stage_of(words: Sequence[str]) -> str:
    """Guess the stage by the keys that only one stage's settings have."""
    given = {
        word.removeprefix("--").split("=")[0].split(".")[0] for word in words if word[:2] == "--"
    }
    for path in config_files(words):
        with suppress(OSError, ValueError, RecursionError, yaml.YAMLError):  # load_config names it
            settings = yaml.safe_load(path.read_text(encoding="utf-8"))
            given |= set(settings) if isinstance(settings, dict) else set()
    return "ppo" if "policy" in given else "rm" if "rankings" in given else "sft"


if __name__ == "__main__":
    main()
