"""Hold the state of a run outside its learner: the coefficient of the KL penalty, and totals."""

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
