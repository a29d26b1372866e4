"""The stages, one after the other on a very small tiny world, log the curves that they always did.

tests/pipeline/golden.py runs them and renews the file.
"""

from pathlib import Path

import pytest

from rlhf.runs.glossary import ANY_NAME, Metric
from stages.ppo import glossary as ppo
from stages.pretrain import glossary as pretrain
from stages.rm import glossary as rm
from stages.sft import glossary as sft
from tests.pipeline.golden import compare, load_golden, read_curves, run_chain

TABLES = {
    "base": pretrain.METRICS,
    "sft": sft.METRICS,
    "rm": rm.METRICS,
    "ppo_ptx": (*ppo.METRICS, *ppo.SECONDS),
}
"""Maps a folder of the chain to the table of what its stage logs."""
NEEDS_REWARD_MODEL = {"sft/eos_rate", "sft/response_tokens", "sft/reward_score"}
"""What SFT logs with a reward model only; tests/stages/test_sft.py has such a run."""


@pytest.mark.slow
def test_curves_are_the_golden_ones(tmp_path: Path) -> None:
    run_chain(tmp_path)
    golden, found = load_golden(), read_curves(tmp_path)
    assert {stage: list(of) for stage, of in found.items()} == {
        stage: list(of) for stage, of in golden.items()
    }
    assert [one for one in compare(golden, found) if one.excess > 1] == []


def described_by(name: str, table: tuple[Metric, ...]) -> str | None:
    """Return the name that a logged metric has in the table."""
    for metric in table:
        stem = metric.name.removesuffix(ANY_NAME)
        if name == metric.name or (stem != metric.name and name.startswith(stem)):
            return metric.name
    return None


@pytest.mark.parametrize("stage", TABLES)
def test_a_stage_logs_what_its_glossary_describes(stage: str) -> None:
    """The test above compares the names in the file with those of a run."""
    table = TABLES[stage]
    described = {described_by(name, table) for name in load_golden()[stage]}
    assert described | (NEEDS_REWARD_MODEL if stage == "sft" else set()) == {
        metric.name for metric in table
    }
