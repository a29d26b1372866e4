"""docs/metrics.md is made from the stages' tables, which name only what exists."""

from pathlib import Path
from typing import Any

import pytest

from rlhf.runs.glossary import Alarm, Metric, by_name
from rlhf.runs.settings import keys_of
from stages.evaluate import glossary as evaluate
from stages.evaluate.config import Config as EvaluateConfig
from stages.ppo import glossary as ppo
from stages.ppo.config import Config as PPOConfig
from stages.pretrain import glossary as pretrain
from stages.pretrain.config import Config as PretrainConfig
from stages.rm import glossary as rm
from stages.rm.config import Config as RMConfig
from stages.sft import glossary as sft
from stages.sft.config import Config as SFTConfig
from tools.metrics_page import CODE, PAGE, healthy, main, marked, render

METRICS = by_name((*ppo.METRICS, *ppo.SECONDS, *rm.METRICS, *sft.METRICS, *pretrain.METRICS)).keys()
FILES = (".json", ".jsonl", ".md")
RESULTS = {"member_0", "member_1", "length_baseline"}
"""Parts of scores and keys of results.json."""


def test_the_page_is_the_rendering_of_the_tables() -> None:
    assert PAGE.read_text(encoding="utf-8") == render(), "run python -m tools.metrics_page"


@pytest.mark.parametrize(
    "texts_of, config",
    [
        ((*ppo.METRICS, *ppo.SECONDS, *ppo.ALARMS), PPOConfig),
        (rm.METRICS, RMConfig),
        (sft.METRICS, SFTConfig),
        (pretrain.METRICS, PretrainConfig),
        (evaluate.ALARMS, EvaluateConfig),
    ],
    ids=["ppo", "rm", "sft", "pretrain", "evaluate"],
)
def test_every_name_in_a_text_exists(texts_of: tuple[Metric | Alarm, ...], config: Any) -> None:
    codes = {alarm.code for alarm in ppo.ALARMS}
    # A warning of the evaluation gives advice on PPO.
    settings = {*keys_of(config), *keys_of(PPOConfig)}
    known = {*METRICS, "seconds/NAME", *codes, *settings, *RESULTS}
    texts = [
        text
        for one in texts_of
        for name, text in vars(one).items()
        if isinstance(text, str) and name not in ("name", "code")
    ]
    names = {found for text in texts for found in CODE.findall(text) if found[0] != "`"}
    sources = {name for name in names if (PAGE.parents[1] / name).is_file()}
    assert {name for name in names - known - sources if not name.endswith(FILES)} == set()


def test_names_are_marked_and_numbers_and_words_are_not() -> None:
    assert marked("Raise ppo.kl_coef (PPO_KL) by 0.5, not e2; `gold` or ppo/kl.") == (
        "Raise `ppo.kl_coef` (`PPO_KL`) by 0.5, not e2; `gold` or `ppo/kl`."
    )
    assert healthy(Metric("a/b", "", "", "falls", (0.0, 0.25))) == "0 to 0.25, falls"
    assert healthy(Metric("a/b", "", "")) == ""


def test_a_name_described_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="a/b is described twice"):
        by_name([Metric("a/b", "", "x"), Metric("a/b", "", "y")])


def test_the_command_writes_the_page_or_says_why_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--output", str(tmp_path / "page.md")]) == 0
    assert (tmp_path / "page.md").read_text(encoding="utf-8") == render()
    assert main(["--output", str(tmp_path / "gone" / "page.md")]) == 2
    assert "name another file with --output" in capsys.readouterr().err
