"""Settings of the PPO stage; a default is InstructGPT's wherever a small run can use it."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from rlhf.generation.settings import GenerationSettings
from rlhf.inputs.ranges import (
    NotNegative,
    NotNegativeInt,
    Positive,
    PositiveInt,
    Range,
    Ranged,
    Share,
    ShareBetween,
    TwoOrMore,
)
from rlhf.models.settings import LoraSettings, ModelSettings
from rlhf.rewards.settings import RewardSettings
from rlhf.runs.settings import StageSettings
from rlhf.runs.trackers import Tracker
from rlhf.training.settings import OptimSettings


@dataclass(frozen=True, kw_only=True)
class RolloutSettings(Ranged):
    """Settings of the rollout: how many responses to sample, and how."""

    batch_size: PositiveInt = 512
    """Episodes in an update, over all processes. An episode is a prompt with one response."""
    max_prompt_tokens: PositiveInt = 1024
    """Most tokens of a prompt. Longer prompts lose their oldest turns. A prompt whose last turn
    alone is longer is dropped before training; the number dropped is printed."""
    max_dropped: Share = 0.05
    """Largest share of the prompts that may be dropped for their length. The run stops above it."""
    max_new_tokens: PositiveInt = 256
    """Most tokens of a response; one that has not ended by then is cut."""
    temperature: Positive = 1.0
    """Sampling temperature. All log-probabilities in PPO are at this temperature."""
    check_every: PositiveInt = 1
    """Updates from one check of the sampler to the next, starting with the first update. A check
    runs the policy over the samples. It gives the log-probabilities, the entropy, and what the
    alarm PPO_SAMPLER needs. In the other updates PPO uses the sampler's own log-probabilities, and
    only the first step's ratio (alarm PPO_RATIO) compares them with the trainer's. That saves one
    pass, 8 % of an update on two cores. Use more than 1 only in float32 and without vLLM: in
    bfloat16 sampler and trainer differ by more than the clip range."""


@dataclass(frozen=True, kw_only=True)
class PPOSettings(Ranged):
    """Settings of the policy gradient."""

    mini_batch_size: PositiveInt = 64
    """Episodes in an optimizer step, over all processes. It must divide rollout.batch_size."""
    num_epochs: PositiveInt = 1
    """Passes over each rollout."""
    max_step_kl: Positive | None = None
    """Limit on how far the policy may move within an update, in nats a token (mean k3). Each step
    first measures the distance to the policy that sampled, which is 0 at the first step. The step
    that finds it above the limit is the last of the update. None means no limit."""
    value_warmup_updates: NotNegativeInt = 0
    """Updates at the start in which only the value model learns. The policy's learning rate
    schedule starts after them."""
    kl_coef: NotNegative = 0.02
    """Weight (beta) of the KL penalty: the reward of a token is reduced by beta times the
    log-ratio of policy to reference policy, in nats."""
    kl_target: Positive | None = None
    """KL to the reference, in nats a response, that kl_coef is adjusted to reach, update by update
    (Ziegler et al. 2019, section 2.2). None means that kl_coef stays as it is."""
    kl_horizon: PositiveInt = 10_000
    """Episodes in which kl_coef changes by a factor of at most 1.2. Used with kl_target only."""
    clip_range: Positive = 0.2
    """Clip range of the policy loss: a ratio of new to old probability outside 1 +- this earns
    nothing more."""
    value_clip_range: Positive | None = 0.2
    """How far a value may move from the rollout's in one update, in units of reward. None means no
    clipping."""
    gamma: Share = 1.0
    """Discount factor for each token; 1 means no discount."""
    gae_lambda: Share = 0.95
    """Decay of generalised advantage estimation."""
    whiten_advantages: bool = True
    """Scale advantages to mean 0 and variance 1 over all tokens of the update, on all
    processes."""


@dataclass(frozen=True, kw_only=True)
class PtxSettings(Ranged):
    """The pretraining mix: adds the gradient of gamma * E[log pi(x)] over pretraining text."""

    coef: NotNegative = 27.8
    """Weight (gamma) of the language modelling loss; 0 means plain PPO. That loss is a mean in nats
    a text token, and the policy loss is a mean over response tokens. InstructGPT's 27.8 depends on
    how its losses were normalised, which the paper does not say. To choose a weight, compare
    ppo/ptx_grad_norm with ppo/ppo_grad_norm."""
    grad_norm_ratio: Positive | None = None
    """Wanted norm of the text's gradient, as a multiple of the norm of PPO's gradient, both of the
    policy. Every step then computes the coefficient that gives this ratio, and logs it as
    ppo/ptx_coef. None means that coef is the coefficient. With coef 0 there is no mix at all."""
    text: str | None = None
    """File or folder of text records. Needed unless coef is 0."""
    targets: Literal["text", "reference"] = "text"
    """What the policy learns from the text. With text it is the next token, as in InstructGPT; that
    suits the text that the base was pretrained on. With reference it is the distribution that the
    reference gives for the next token (distillation; Li and Hoiem 2016). The loss is then the KL,
    which is 0 until the policy moves away. So other text does no harm: it does not teach its style.
    Each pass over text costs one more, of the reference."""
    blocks_per_episode: Positive = 8.0
    """Blocks of text in a step for each episode of the mini-batch."""
    block_tokens: TwoOrMore = 128
    """Tokens in a block. Documents are joined and cut into full blocks."""
    document_start: str | None = None
    """Special token before each document. None means the tokenizer's BOS (or EOS) token. Give the
    one that pretraining used if that differs, as with many chat models: <|endoftext|> for Qwen2.5
    and SmolLM2, whose BOS or EOS tokens mark turns of a dialogue."""
    gradient_norms: bool = True
    """Log the norms of the PPO and the ptx gradient, and their cosine. This takes memory for two
    copies of the policy's gradient, the second only while no pass runs."""


@dataclass(frozen=True, kw_only=True)
class MonitorSettings(Ranged):
    """Limits at which the monitor warns or stops the run; docs/metrics.md lists the codes."""

    stop_on: list[str] = field(
        default_factory=lambda: ["PPO_REFERENCE", "PPO_SAMPLER", "PPO_RATIO", "PPO_NEG_KL"]
    )
    """Codes of the alarms that end the run; all others only warn. PPO_NONFINITE always ends it."""
    max_kl: Positive = 50.0
    """Largest KL to the reference, in nats a response. Runs that collapse reach 50 and more (Huang
    et al. 2024)."""
    max_update_kl: Positive = 0.1
    """Largest distance from the policy that sampled, in nats a token, as a mean over an update."""
    max_clip_fraction: Positive = 0.3
    """Largest share of tokens whose ratio is clipped."""
    min_eos_rate: float = 0.5
    """Smallest share of responses that end with their end token."""
    max_length_change: Annotated[float, Range(above=1)] = 3.0
    """Factor by which the mean length may grow or shrink from that of the first update."""
    min_distinct: float = 0.5
    """Smallest share of different bigrams, as a multiple of the share in the first update."""
    max_one_answer: Positive = 0.07
    """Largest share of a rollout's different prompts that may get the same response, as a mean of
    the last four updates. Above it the monitor warns if the odds have also more than tripled since
    the first update. Raise it where more prompts have the same right answer."""
    max_value_loss_growth: Annotated[float, Range(above=1)] = 10.0
    """Largest value loss, as a multiple of the median of the ten updates before."""
    max_value_error: Positive = 10.0
    """Largest root mean square error of the value model, in units of ppo.value_clip_range."""


@dataclass(frozen=True, kw_only=True)
class Config(StageSettings):
    """PPO and PPO-ptx: train a policy to score higher on a reward while it stays near a reference
    policy."""

    output_dir: str
    """Folder of this run: the aligned policy, metrics.jsonl, samples.jsonl, results.json."""
    policy: ModelSettings
    """The SFT model. The policy starts from it, and a frozen copy is the reference of the KL
    penalty."""
    prompts: str
    """File or folder of prompt records to sample responses for."""
    prompts_held_out: str | None = None
    """Prompts for the regular evaluation. None means no evaluation."""
    reward: RewardSettings
    """Where scores come from."""
    lora: LoraSettings = field(default_factory=LoraSettings)
    """Train adapters on the policy and the value model. The value model's adapter starts as the
    reward model's and keeps its rank. Models over the same frozen weights share one copy."""
    value_model: str | None = None
    """Folder of the reward model that the value model starts from; it needs the policy's
    vocabulary. None means the run's reward model, or the first of several. Where there is none, or
    it has another vocabulary, the value model is the SFT model with a new head of zeros."""
    rollout: RolloutSettings = field(default_factory=RolloutSettings)
    """Settings of the rollout: how many responses to sample, and how."""
    generation: GenerationSettings = field(default_factory=GenerationSettings)
    """The engine that samples."""
    ppo: PPOSettings = field(default_factory=PPOSettings)
    """Settings of the policy gradient."""
    ptx: PtxSettings = field(default_factory=PtxSettings)
    """The pretraining mix."""
    monitor: MonitorSettings = field(default_factory=MonitorSettings)
    """Limits of a healthy run."""
    optim: OptimSettings = field(
        default_factory=lambda: OptimSettings(
            learning_rate=9.65e-6, schedule="constant", warmup_steps=80, eps=1e-5
        )
    )
    """Optimizer of the policy. Its steps are optimizer steps, by default 8 in an update."""
    value_learning_rate: Positive = 9e-6
    """Peak learning rate of the value model, on the same schedule."""
    num_updates: PositiveInt = 500
    """Number of updates, each on one rollout. A run has num_updates * rollout.batch_size
    episodes."""
    ema_decay: ShareBetween | None = 0.992
    """Decay of the moving average of the policy's weights, applied once an optimizer step. The
    average is saved as the aligned policy. None means that the last weights are saved."""
    micro_batch_tokens: PositiveInt = 4096
    """Most tokens in one forward or backward pass on one process. It changes no result."""
    checkpoint_every: PositiveInt | None = 10
    """Updates between checkpoints. An interrupted run continues from the last one when the same
    command is given again. A checkpoint holds both models, the optimizer and the average: four to
    five times the weights. None means no checkpoints."""
    policy_every: PositiveInt | None = None
    """Updates between copies of the policy, in policies/update-N. A copy loads like the final
    policy: go back to one from before an alarm, or evaluate several to see how the reward and
    other judges change along the run. None means no copies."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: takes less memory and about a third more time."""
    offload: bool = False
    """Keep the reference and the reward models in CPU memory while they are not used. This frees
    the device's memory for the price of moving their weights. On a CPU it changes nothing."""
    eval_every: PositiveInt = 10
    """Updates between evaluations on prompts_held_out."""
    num_eval_prompts: PositiveInt = 64
    """Prompts of the regular evaluation."""
    num_samples: NotNegativeInt = 8
    """Held-out prompts whose responses go to samples.jsonl at each evaluation."""
    trackers: list[Tracker] = field(default_factory=list)
    """Where metrics and samples go besides metrics.jsonl and samples.jsonl: tensorboard, wandb."""
    seed: int = 0
    """Seed of sampling, of the order of prompts and text, and of new heads."""

    def __post_init__(self) -> None:
        super().__post_init__()
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
        if rollout.batch_size % ppo.mini_batch_size:
            nearest = _nearest_divisor(rollout.batch_size, ppo.mini_batch_size)
            raise ValueError(
                f"ppo.mini_batch_size is {ppo.mini_batch_size}, which does not divide "
                f"rollout.batch_size {rollout.batch_size}; the nearest that does is {nearest}"
            )
        if ppo.kl_target is not None and ppo.kl_coef == 0:
            raise ValueError(
                f"ppo.kl_target is {ppo.kl_target} but ppo.kl_coef is 0, which no factor can "
                "change; give the coefficient to start from, such as 0.05"
            )
        if ppo.value_warmup_updates >= self.num_updates:
            raise ValueError(
                f"ppo.value_warmup_updates is {ppo.value_warmup_updates} of num_updates "
                f"{self.num_updates}; give fewer than all, or the policy learns nothing"
            )

    def _check_ptx(self) -> None:
        ptx = self.ptx
        if ptx.coef > 0 and ptx.text is None:
            raise ValueError(
                f"ptx.coef is {ptx.coef} but ptx.text is not given; name a file of text records, "
                "or set ptx.coef to 0 for plain PPO"
            )

    def value_settings(self, path: str) -> ModelSettings:
        """Return how to load a value model that starts from this reward model.

        Its dtype is float32 if all weights are trained. If an adapter is trained over them, it is
        the policy's dtype.
        """
        return ModelSettings(
            path=path,
            dtype=self.policy.dtype if self.lora.rank else "float32",
            attention=self.policy.attention,
            trust_remote_code=self.policy.trust_remote_code or self.reward.trust_remote_code,
        )

    def check_launch(self, mixed_precision: str, num_processes: int) -> None:
        """Raise a ValueError if these settings cannot run under this launcher."""
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
        """Blocks of text in a step, over all processes.

        The stage rounds it up to a number that the processes can share equally.
        """
        if self.ptx.coef == 0:
            return 0
        return max(1, round(self.ptx.blocks_per_episode * self.ppo.mini_batch_size))

    @property
    def value_warmup_steps(self) -> int:
        return self.ppo.value_warmup_updates * self.steps_per_update

    @property
    def num_steps(self) -> int:
        return self.num_updates * self.steps_per_update


def _nearest_divisor(number: int, wanted: int) -> int:
    divisors = [d for d in range(1, number + 1) if number % d == 0]
    return min(divisors, key=lambda d: abs(d - wanted))
