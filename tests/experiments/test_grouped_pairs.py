"""Tests the study of grouped pairs: what its arms share, what it reads and what it writes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from experiments.grouped_pairs import (
    Config,
    compare_groupings,
    draw,
    format_table,
    over_runs,
    read_epochs,
    shuffled_pairs,
    split,
)
from rlhf.inputs.files import read_records
from rlhf.inputs.records import Ranking
from rlhf.maths.losses import ranking_loss
from rlhf.models.loading import new_policy
from rlhf.models.saving import save_policy
from rlhf.runs.settings import settings_in_use
from stages.rm.batches import make_comparisons
from tests.rlhf.tiny_models import byte_tokenizer
from tests.stages.test_rm import ARCHITECTURES, make_config, make_rankings

RANKINGS = [
    Ranking("p", ("a", "b", "c", "d"), (2, 1, 2, None), source="x"),
    Ranking("q", ("e", "f"), (1, 2), weight=3.0),
    Ranking("r", ("g", "h", "i"), (None,) * 3, probabilities=((0, 1, 0.5), (2, 1, 0.8))),
]


def loss_of(rankings: list[Ranking]) -> float:
    """Return the loss for scores that depend on each response's text alone."""
    comparisons = make_comparisons(rankings, margin_per_rank=0.5)
    texts = [text for ranking in rankings for text in ranking.responses]
    scores = torch.tensor([float(ord(text) * 7 % 5) for text in texts])
    loss, _ = ranking_loss(
        scores,
        comparisons.preferences,
        comparisons.tree_index,
        num_prompts=sum(ranking.weight for ranking in rankings),
        weights=comparisons.weights,
        margins=comparisons.margins,
    )
    return loss.item()


def test_shuffled_pairs_have_the_objective_of_the_rankings() -> None:
    pairs = shuffled_pairs(RANKINGS)
    assert len(pairs) == 5
    assert pairs[0] == Ranking("p", ("b", "a"), (1, 2), source="x", weight=0.5)
    assert loss_of(pairs) == pytest.approx(loss_of(RANKINGS), abs=1e-6)


def test_no_prompt_is_on_both_sides() -> None:
    rankings = [Ranking(f"{i % 10}", (f"a{i}", "b"), (1, 2)) for i in range(30)]
    trained, measured = split(rankings, 6, 3, seed=0)
    assert (len(trained), len(measured)) == (18, 9)
    assert not {one.prompt for one in trained} & {one.prompt for one in measured}
    assert split(rankings, 6, 3, seed=0) == (trained, measured)
    assert split(rankings, 6, 3, seed=1) != (trained, measured)
    with pytest.raises(ValueError, match="num_held_out 5 are more than the 10 prompts"):
        split(rankings, 6, 5, seed=0)


def write_metrics(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_figures_of_two_runs_by_hand(tmp_path: Path) -> None:
    epochs: dict[str, list[Any]] = {}
    for arm, start in (("grouped", 0.5), ("shuffled", 0.25)):
        epochs[arm] = [
            read_epochs(
                write_metrics(
                    tmp_path / "metrics.jsonl",
                    {"step": 1, "rm/loss": 0.75},
                    {"step": 2, "rm/loss": 0.25},
                    {"step": 2, "rm/held_out_loss": 1.0, "rm/held_out_accuracy": start + run / 4},
                    {"step": 3, "rm/loss": 0.125},
                    {"step": 3, "rm/held_out_loss": 2.0, "rm/held_out_accuracy": start * 2},
                )
            )
            for run in range(2)
        ]
    figures = over_runs(epochs)
    assert list(figures) == ["loss", "held_out_loss", "held_out_accuracy"]
    assert figures["loss"]["grouped"] == [[0.5, 0.5], [0.125, 0.125]]
    assert figures["held_out_accuracy"]["grouped"] == [[0.5, 0.75], [1.0, 1.0]]
    row = next(line for line in format_table(figures).splitlines() if "by labels" in line)
    # t for one degree of freedom is 12.706, and the standard error of 0.5 and 0.75 is 0.125.
    assert row == (
        "| held-out accuracy by labels, share of pairs | 1 | 0.625 ± 1.588 | 0.375 ± 1.588 "
        "| -0.250 ± 0.000 | -0.250, -0.250 |"
    )
    draw(figures, str(tmp_path / "new" / "plot.png"))
    assert (tmp_path / "new" / "plot.png").read_bytes().startswith(b"\x89PNG")


@pytest.fixture
def runs(tmp_path: Path) -> list[str]:
    """Write two folders with all that the study reads from a pipeline's folder."""
    torch.manual_seed(0)
    tokenizer = byte_tokenizer("<end>", "<pad>", eos_token="<end>", pad_token="<pad>")
    folders = []
    for seed in range(2):
        sft = tmp_path / f"seed{seed}" / "sft"
        architecture = {"model_type": "llama", **ARCHITECTURES["llama"]}
        save_policy(new_policy(architecture, tokenizer), tokenizer, sft)
        made = make_config(sft, make_rankings(30, seed), seed=seed)
        Path(made.output_dir).mkdir()
        settings = yaml.safe_dump(settings_in_use(made))
        (Path(made.output_dir) / "config.yaml").write_text(settings)
        folders.append(str(sft.parent))
    return folders


@pytest.mark.slow
@pytest.mark.long
def test_from_runs_to_results(runs: list[str], tmp_path: Path) -> None:
    study = tmp_path / "study"
    config = Config(
        runs=runs,
        num_prompts=20,
        num_held_out=10,
        num_epochs=2,
        output_dir=str(study),
        plot=str(tmp_path / "plot.png"),
    )
    compare_groupings(config)
    results = json.loads((study / "results.json").read_text())
    assert [row["epoch"] for row in results["held_out_loss"]] == [1, 2]
    assert len(results["held_out_accuracy"][0]["difference"]["values"]) == 2
    folder = study / "seed1" / "20_10_prompts"
    grouped, shuffled = (
        json.loads((folder / arm / "results.json").read_text()) for arm in ("grouped", "shuffled")
    )
    assert grouped["steps"] == shuffled["steps"] == 2 * 3
    assert (grouped["train_prompts"], shuffled["train_prompts"]) == (20, 80)
    assert grouped["pairs"] == shuffled["pairs"] == 4 * 10
    assert {len(one.responses) for one in read_records(folder / "shuffled.jsonl", Ranking)} == {2}
    before = (folder / "grouped" / "results.json").read_bytes()
    compare_groupings(config)
    assert (folder / "grouped" / "results.json").read_bytes() == before, "its seconds would differ"
    again = json.loads((study / "results.json").read_text())
    assert {**again, "seconds": 0} == {**results, "seconds": 0}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"runs": ["a"]}, "two or more folders"),
        ({"runs": ["a/x", "b/x"]}, "of different names"),
        ({"num_epochs": 0}, "num_epochs is 0"),
    ],
)
def test_contradictory_settings_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Config(**changes)
