"""Measure a reward model on held-out rankings."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object

from rlhf.inputs.packing import Packer, PromptTree
from rlhf.models.passes import compute_scores
from rlhf.models.scalar import ScalarModel
from rlhf.training import sharding
from rlhf.training.processes import own_share
from rlhf.training.step import TrainState
from stages.rm import pair_metrics
from stages.rm.config import Config
from stages.rm.data import Example


@dataclass(frozen=True)
class HeldOut:
    """Holds rankings to measure on, and which response of a pair each judge finds better."""

    examples: list[Example]
    preferences_by_judge: list[list[list[pair_metrics.Preference]]]
    """for each judge, the preferences of each example: first the labels, then, where there is one,
    the gold score"""

    @classmethod
    def of(cls, examples: list[Example], gold: pair_metrics.ScoreFunction | None) -> "HeldOut":
        preferences_by_judge = [pair_metrics.label_preferences(examples)]
        if gold is not None:
            preferences_by_judge.append(pair_metrics.gold_preferences(examples, gold))
        return cls(examples, preferences_by_judge)

    def pairs(
        self, model: ScalarModel, packer: Packer, accelerator: Accelerator
    ) -> list[list[pair_metrics.Pair]]:
        """Return the pairs of each judge, with the margins of the model's scores."""
        trees = [example.tree for example in self.examples]
        scores = score_all(model, trees, packer, accelerator)
        return [
            pair_metrics.compare(self.examples, scores, preferences)
            for preferences in self.preferences_by_judge
        ]


def measure(
    state: TrainState[ScalarModel], packer: Packer, held_out: HeldOut, config: Config
) -> dict[str, float]:
    """Measure the model in training, between two steps."""
    state.optimizer.zero_grad()  # gradients take memory that the scores need
    with sharding.whole_weights(state.accelerator, state.model):
        state.module.eval()
        pairs = held_out.pairs(state.module, packer, state.accelerator)
    return held_out_metrics(config, *pairs)


def score_all(
    model: ScalarModel, trees: Sequence[PromptTree], packer: Packer, accelerator: Accelerator
) -> list[list[float]]:
    """Return the scores of every tree's responses; the processes share the work."""
    shares = own_share(accelerator, list(enumerate(trees)))
    flat = iter(
        compute_scores(model, [tree for _, tree in shares], packer).tolist() if shares else ()
    )
    own = [(number, [next(flat) for _ in tree.responses]) for number, tree in shares]
    return [scores for _, scores in sorted(gather_object(own))]


def held_out_metrics(
    config: Config,
    pairs: Sequence[pair_metrics.Pair],
    gold_pairs: Sequence[pair_metrics.Pair] | None = None,
) -> dict[str, float]:
    metrics = {
        "rm/held_out_accuracy": pair_metrics.accuracy(pairs, config.seed).value,
        "rm/held_out_loss": pair_metrics.log_loss(pairs),
    }
    if gold_pairs is not None:
        metrics["rm/held_out_accuracy_gold"] = pair_metrics.accuracy(gold_pairs, config.seed).value
    return metrics


def final_metrics(
    config: Config,
    train_set: Sequence[Example],
    pairs: Sequence[pair_metrics.Pair],
    gold_pairs: Sequence[pair_metrics.Pair] | None = None,
) -> dict[str, Any]:
    """Compute held-out figures against the labels and, where there is one, the gold score."""
    no_scores = [[0.0] * len(example.tree.responses) for example in train_set]
    train_pairs = pair_metrics.compare(
        train_set, no_scores, pair_metrics.label_preferences(train_set)
    )
    longer_wins = pair_metrics.does_longer_win(train_pairs)
    error, table = pair_metrics.calibration(pairs)
    baseline = pair_metrics.length_accuracy(pairs, longer_wins=longer_wins)
    results = {
        **pair_metrics.describe_pairs(pairs, config.seed),
        "length_baseline": baseline,
        "length_baseline_labels": baseline,
        "length_direction": "longer wins" if longer_wins else "shorter wins",
        "calibration_error": error,
        "calibration": table,
        "by_source": pair_metrics.by_source(pairs, config.seed),
    }
    if gold_pairs is not None:
        share, interval = pair_metrics.accuracy(gold_pairs, config.seed)
        gold_baseline = pair_metrics.length_accuracy(gold_pairs, longer_wins=longer_wins)
        results |= {
            "pair_accuracy_gold": share,
            "pair_accuracy_gold_interval": list(interval),
            "length_baseline": gold_baseline,
            "length_baseline_gold": gold_baseline,
            "pairs_gold": len(gold_pairs),
        }
    return results
