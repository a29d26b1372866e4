"""Settings of the PPO stage. Defaults are InstructGPT's where a small run can use them."""

from dataclasses import dataclass, field

from rlhf.generation.settings import GenerationSettings
from rlhf.models.settings import LoraSettings, ModelSettings
from rlhf.rewards.settings import RewardSettings
from rlhf.runs.settings import MayOverwrite
from rlhf.runs.trackers import Tracker
from rlhf.training.settings import OptimSettings


@dataclass(frozen=True, kw_only=True)
class RolloutSettings:
    """Sampling of responses."""

    batch_size: int = 512
    """Episodes (prompts, one response each) an update, over all processes."""
    max_prompt_tokens: int = 1024
    """Longer prompts lose their oldest turns; those whose last turn alone is longer are dropped
    before training, counted and reported."""
    max_new_tokens: int = 256
    """A response without its end token is cut here."""
    temperature: float = 1.0
    """Sampling temperature; log-probabilities everywhere in PPO are at this temperature."""
    check_every: int = 1
    """Updates between checks of the sampler, the first update among them: a pass of the policy over
    what was sampled gives the log-probabilities, their entropy, and what PPO_SAMPLER looks at. In
    the other updates the sampler's log-probabilities are taken as they are, that pass is saved (8 %
    of an update on two cores), and the first step's ratio (PPO_RATIO) still compares them with the
    trainer's. Above 1 in float32 only, and not with vLLM: in bfloat16 the two differ by more than a
    clip."""


@dataclass(frozen=True, kw_only=True)
class PPOSettings:
    """The policy gradient step."""

    mini_batch_size: int = 64
    """Episodes an optimizer step, over all processes; divides rollout.batch_size."""
    num_epochs: int = 1
    """Passes over each rollout."""
    max_step_kl: float | None = None
    """The step that finds the policy further than this from the one that sampled (mean k3, nats a
    token, before the step) is the last of its update; the first step finds 0. None means that all
    steps are taken."""
    value_warmup_updates: int = 0
    """First updates in which the value model alone learns; the policy's schedule starts behind."""
    kl_coef: float = 0.02
    """Nats of KL to the reference policy are subtracted from the reward times this (beta)."""
    kl_target: float | None = None
    """Nats of KL a response that kl_coef is steered to, update by update (Ziegler et al. 2019,
    2.2). None means that kl_coef stays as it is."""
    kl_horizon: int = 10_000
    """Episodes in which kl_coef can change by a factor of 1.2 at most; read with kl_target only."""
    clip_range: float = 0.2
    """The ratio of new to old probability stops paying outside 1 +- this."""
    value_clip_range: float | None = 0.2
    """Values may move this far, in units of reward, from the rollout's. None means no clipping."""
    gamma: float = 1.0
    """Discount a token; 1 means none."""
    gae_lambda: float = 0.95
    """Decay of generalised advantage estimation."""
    whiten_advantages: bool = True
    """Advantages to mean 0 and variance 1 over all tokens of the update, on all processes."""


@dataclass(frozen=True, kw_only=True)
class PtxSettings:
    """The pretraining mix: gamma * E[log pi(x)] over pretraining text, in the same gradient."""

    coef: float = 27.8
    """Weight (gamma) of the language modelling loss, which is a mean in nats a token; the policy
    loss it is added to is a mean over response tokens. 0 means plain PPO. InstructGPT's 27.8 is
    tied to its own unstated normaliser; see ppo/ptx_grad_norm against ppo/ppo_grad_norm."""
    grad_norm_ratio: float | None = None
    """Norm of the text's gradient as a multiple of the PPO gradient's, both of the policy: in every
    step the coefficient is what gives it (logged as ppo/ptx_coef). None means that coef is the
    coefficient. With coef 0 there is no mix at all."""
    text: str | None = None
    """File or folder of text records. Needed unless coef is 0."""
    blocks_per_episode: float = 8.0
    """Blocks of text a step for each episode of the mini-batch."""
    block_tokens: int = 128
    """Tokens a block; text is packed to full blocks, documents set apart by the tokenizer's BOS
    (or EOS) token."""
    gradient_norms: bool = True
    """Log the norms of the PPO and the ptx gradient and their cosine, at the cost of two copies of
    the policy's gradient, the second only while no pass runs."""


@dataclass(frozen=True, kw_only=True)
class MonitorSettings:
    """When the monitor warns, and when it stops; docs/metrics.md lists the codes."""

    stop_on: list[str] = field(
        default_factory=lambda: ["PPO_REFERENCE", "PPO_SAMPLER", "PPO_RATIO", "PPO_NEG_KL"]
    )
    """Codes of alarms that end the run; all others only warn. PPO_NONFINITE always ends it."""
    max_kl: float = 50.0
    """Nats of KL to the reference a response; runs that collapse lie at 50 and more (Huang et al.
    2024)."""
    max_update_kl: float = 0.1
    """Nats a token that the policy may move from the one that sampled, mean over an update."""
    max_clip_fraction: float = 0.3
    """Share of tokens whose ratio is clipped."""
    min_eos_rate: float = 0.5
    """Share of responses that end by themselves."""
    max_length_change: float = 3.0
    """Factor by which the mean length may grow or shrink against the first update."""
    min_distinct: float = 0.5
    """Share of different bigrams, against that of the first update."""
    max_one_answer: float = 0.07
    """Share of a rollout's different prompts that one and the same response may go to, mean of the
    last four updates. Above it the monitor warns if the odds of it have also more than tripled
    since the first update. Raise it where more prompts than that have one right answer."""
    max_value_loss_growth: float = 10.0
    """Value loss against the median of the ten updates before."""
    max_value_error: float = 10.0
    """Root mean square error of the value model, in units of ppo.value_clip_range."""

    def __post_init__(self) -> None:
        _positive(self, "max_kl", "max_update_kl", "max_clip_fraction", "max_value_error")
        _positive(self, "max_one_answer")
        if not min(self.max_length_change, self.max_value_loss_growth) > 1:
            raise ValueError(
                f"max_length_change is {self.max_length_change} and max_value_loss_growth is "
                f"{self.max_value_loss_growth}; both are factors, give more than 1"
            )


@dataclass(frozen=True, kw_only=True)
class Config(MayOverwrite):
    """PPO and PPO-ptx: optimise a policy against a reward, near its reference, on its prompts."""

    output_dir: str
    """Folder of this run: the aligned policy, metrics.jsonl, samples.jsonl, results.json."""
    policy: ModelSettings
    """The SFT model: where the policy starts, and the frozen reference of the KL penalty."""
    prompts: str
    """File or folder of prompt records to sample responses for."""
    prompts_held_out: str | None = None
    """Prompts for the regular evaluation. None means that none is done."""
    reward: RewardSettings
    """Where scores come from."""
    lora: LoraSettings = field(default_factory=LoraSettings)
    """Train an adapter on the policy, and on the value model one that starts as the reward model's
    and keeps its rank. Models over the same frozen weights hold them once."""
    value_model: str | None = None
    """Reward model folder that the value model starts from, with the policy's vocabulary. None
    means the reward model, of several the first; where there is none, or it has another vocabulary,
    the SFT model with a new head whose weights are 0."""
    rollout: RolloutSettings = field(default_factory=RolloutSettings)
    """Sampling of responses."""
    generation: GenerationSettings = field(default_factory=GenerationSettings)
    """How responses are sampled."""
    ppo: PPOSettings = field(default_factory=PPOSettings)
    """The policy gradient step."""
    ptx: PtxSettings = field(default_factory=PtxSettings)
    """The pretraining mix."""
    monitor: MonitorSettings = field(default_factory=MonitorSettings)
    """Limits of a healthy run."""
    optim: OptimSettings = field(
        default_factory=lambda: OptimSettings(
            learning_rate=9.65e-6, schedule="constant", warmup_steps=80, eps=1e-5
        )
    )
    """Optimizer of the policy; steps are optimizer steps, 8 an update by default."""
    value_learning_rate: float = 9e-6
    """Peak learning rate of the value model; same schedule."""
    num_updates: int = 500
    """Rollouts; episodes in all are num_updates * rollout.batch_size."""
    ema_decay: float | None = 0.992
    """Moving average of the policy's weights, once an optimizer step; the average is what is saved
    as the aligned policy. None means that the last weights are."""
    micro_batch_tokens: int = 4096
    """Most tokens a forward or backward pass holds on one process; changes no result."""
    checkpoint_every: int | None = 10
    """Updates between checkpoints, from which a run that was cut off goes on when the same command
    is given again. Each holds both models, the optimizer and the average: four to five times the
    weights. None writes none."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass: less memory, about a third more time."""
    offload: bool = False
    """The reference and the reward models wait in CPU memory and are on the device only while they
    are used. Room for their weights against the seconds of moving them; nothing on a CPU."""
    eval_every: int = 10
    """Updates between evaluations on prompts_held_out."""
    num_eval_prompts: int = 64
    """Prompts of the regular evaluation."""
    num_samples: int = 8
    """Held-out prompts whose responses go to samples.jsonl at each evaluation."""
    trackers: list[Tracker] = field(default_factory=list)
    """Where metrics and samples go besides metrics.jsonl and samples.jsonl: tensorboard, wandb."""
    seed: int = 0
    """Seed of sampling, of the order of prompts and text, and of new heads."""

    def __post_init__(self) -> None:
        _positive(self, "num_updates", "micro_batch_tokens", "eval_every", "value_learning_rate")
        _positive(self, "num_eval_prompts")
        if self.checkpoint_every is not None:
            _positive(self, "checkpoint_every")
        _positive(self.rollout, "batch_size", "max_prompt_tokens", "max_new_tokens", "temperature")
        _positive(self.rollout, "check_every")
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise ValueError(f"ema_decay is {self.ema_decay}; give a number in (0, 1), or null")
        self._check_ppo()
        self._check_ptx()
        if self.offload and self.lora.rank:
            raise ValueError(
                f"offload is {self.offload} and lora.rank is {self.lora.rank}: with adapters the "
                "reference is the policy's own weights, which cannot leave; set offload to false"
            )
        if self.generation.engine == "vllm" and self.lora.quantize != "none":
            raise ValueError(
                f"generation.engine is vllm and lora.quantize is {self.lora.quantize}, whose "
                "packed weights it cannot be given; set generation.engine to hf, or lora.quantize "
                "to none"
            )

    def _check_ppo(self) -> None:
        rollout, ppo = self.rollout, self.ppo
        _positive(ppo, "mini_batch_size", "num_epochs", "clip_range")
        if rollout.batch_size % ppo.mini_batch_size:
            nearest = _nearest_divisor(rollout.batch_size, ppo.mini_batch_size)
            raise ValueError(
                f"ppo.mini_batch_size is {ppo.mini_batch_size}, which does not divide "
                f"rollout.batch_size {rollout.batch_size}; the nearest that does is {nearest}"
            )
        if ppo.kl_coef < 0:
            raise ValueError(f"ppo.kl_coef is {ppo.kl_coef}; below 0 it would reward drifting away")
        if ppo.kl_target is not None:
            _positive(ppo, "kl_target", "kl_horizon")
            if ppo.kl_coef == 0:
                raise ValueError(
                    f"ppo.kl_target is {ppo.kl_target} but ppo.kl_coef is 0, which no factor can "
                    "change; give the coefficient to start from, such as 0.05"
                )
        for name in ("max_step_kl", "value_clip_range"):
            if getattr(ppo, name) is not None:
                _positive(ppo, name)
        for name in ("gamma", "gae_lambda"):
            if not 0 <= getattr(ppo, name) <= 1:
                raise ValueError(f"ppo.{name} is {getattr(ppo, name)}; give a number in [0, 1]")
        if not 0 <= ppo.value_warmup_updates < self.num_updates:
            raise ValueError(
                f"ppo.value_warmup_updates is {ppo.value_warmup_updates} of num_updates "
                f"{self.num_updates}; give 0 or more, and fewer than all, or the policy learns "
                "nothing"
            )

    def _check_ptx(self) -> None:
        ptx = self.ptx
        _positive(ptx, "blocks_per_episode")
        if ptx.coef < 0:
            raise ValueError(f"ptx.coef is {ptx.coef}; below 0 it would unlearn the text")
        if ptx.coef > 0 and ptx.text is None:
            raise ValueError(
                f"ptx.coef is {ptx.coef} but ptx.text is not given; name a file of text records, "
                "or set ptx.coef to 0 for plain PPO"
            )
        if ptx.block_tokens < 2:
            raise ValueError(
                f"ptx.block_tokens is {ptx.block_tokens}; give 2 or more, since the first one of a "
                "block is only read"
            )
        if ptx.grad_norm_ratio is not None and not ptx.grad_norm_ratio > 0:
            raise ValueError(
                f"ptx.grad_norm_ratio is {ptx.grad_norm_ratio}; give a number above 0, or set "
                "ptx.coef to 0 for plain PPO"
            )

    def value_settings(self, path: str) -> ModelSettings:
        """How a value model that starts from this reward model is held: in float32 where all of
        its weights are trained, in the policy's type where they are a base below an adapter."""
        return ModelSettings(
            path=path,
            dtype=self.policy.dtype if self.lora.rank else "float32",
            attention=self.policy.attention,
            trust_remote_code=self.policy.trust_remote_code or self.reward.trust_remote_code,
        )

    def check_launch(self, mixed_precision: str, num_processes: int) -> None:
        """Refuses, with a ValueError, a launcher under which these settings cannot run."""
        if mixed_precision not in ("no", "bf16"):
            raise ValueError(
                f"mixed_precision of the launcher is {mixed_precision}, whose scaled gradients PPO "
                "can neither compare nor clip by model; give bf16 or no"
            )
        size = self.ppo.mini_batch_size
        if size % num_processes:
            raise ValueError(
                f"ppo.mini_batch_size is {size}, which {num_processes} processes cannot share "
                f"equally; give a multiple of {num_processes}"
            )

    @property
    def steps_per_update(self) -> int:
        return self.ppo.num_epochs * self.rollout.batch_size // self.ppo.mini_batch_size

    @property
    def text_blocks_per_step(self) -> int:
        """Of all processes; a number that they cannot share equally is rounded up."""
        if self.ptx.coef == 0:
            return 0
        return max(1, round(self.ptx.blocks_per_episode * self.ppo.mini_batch_size))

    @property
    def value_warmup_steps(self) -> int:
        return self.ppo.value_warmup_updates * self.steps_per_update

    @property
    def num_steps(self) -> int:
        return self.num_updates * self.steps_per_update


def _positive(section: object, *names: str) -> None:
    for name in names:
        if not getattr(section, name) > 0:
            raise ValueError(f"{name} is {getattr(section, name)}; give a number above 0")


def _nearest_divisor(number: int, wanted: int) -> int:
    divisors = [d for d in range(1, number + 1) if number % d == 0]
    return min(divisors, key=lambda d: abs(d - wanted))
