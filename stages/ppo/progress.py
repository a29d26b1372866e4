"""Hold the state of a run outside its learner: the coefficient of the KL penalty, and totals."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from rlhf.maths.kl import adapt_kl_coef
from stages.ppo.config import Config


@dataclass
class Progress:
    """Holds what an update leaves for the next one, and for results.json."""

    kl_coef: float
    """Coefficient of the next update."""
    raw_scores: dict[str, float]
    """Mean and standard deviation before reward.normalize_on; empty without that setting."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Metrics of the last update."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Seconds of all updates, by phase."""

    def record(self, metrics: dict[str, float], seconds: dict[str, float]) -> None:
        """Record an update that is done."""
        self.metrics = metrics
        for name, value in seconds.items():
            self.seconds[name] = self.seconds.get(name, 0.0) + value


def last_line(metrics: Mapping[str, float], alarms: Iterable[str], num_updates: int) -> str:
    """Return what the stage prints of its end, from the metrics of the last update.

    Args:
        alarms: Codes of the alarms that rang.
    """
    where = "held_out_" if "ppo/held_out_score" in metrics else ""
    tokens = metrics["ppo/held_out_tokens" if where else "ppo/response_tokens"]
    return (
        f"after {num_updates} updates {'held-out ' if where else ''}score "
        f"{metrics[f'ppo/{where}score']:.2f}, KL {metrics[f'ppo/{where}kl']:.2f} nats and "
        f"{tokens:.1f} tokens a response; alarms: {', '.join(alarms) or 'none'}"
    )


def next_kl_coef(kl_coef: float, kl: float, config: Config) -> float:
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
