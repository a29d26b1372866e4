"""Tests the page about a run: its numbers are the run's, texts are inert, faults are shown."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml

import tools.report.folders
from rlhf.runs.settings import load_config, settings_in_use
from stages.ppo.monitor import CODES
from stages.rm.config import Config as RMConfig
from tests.tools.report_runs import (
    HOSTILE,
    write_collect,
    write_json,
    write_long_ppo,
    write_pipeline,
    write_ppo,
    write_rm,
    write_rows,
    write_sft,
)
from tools.report.__main__ import main
from tools.report.charts import LEFT, RIGHT, WIDTH
from tools.report.folders import read_run
from tools.report.lineage import find_inputs
from tools.report.page import content_policy
from tools.report.panels import (
    MAX_POINTS,
    METRICS,
    PANELS,
    find_curves,
    running_mean,
    thin_out,
)
from tools.report.samples import mark_new, show_text

ROOT = Path(__file__).parents[2]


class Reader(HTMLParser):
    """Collects what a browser would: elements, figures, visible text, the script's data."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.figures: list[tuple[str, str, str]] = []
        """Triples of origin, exact value and shown text."""
        self.text = ""
        self.scripts: list[str] = []
        self._open: dict[str, str | None] | None = None
        self._kind = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._kind, named = tag, dict(attrs)
        self.elements.append((tag, named))
        if "data-origin" in named:
            self._open = named

    def handle_data(self, data: str) -> None:
        if self._kind == "script":
            self.scripts.append(data)
        elif self._kind != "style":
            self.text += data
        if self._open is not None:
            value = self._open.get("value") or self._open.get("data-value")
            self.figures.append((str(self._open["data-origin"]), str(value), data))
            self._open = None

    def handle_endtag(self, tag: str) -> None:
        self._kind = ""


def page_of(*folders: Path) -> str:
    assert main([str(folder) for folder in folders]) == 0
    others = "_".join(folder.name for folder in folders[1:])
    name = f"report_vs_{others}.html" if others else "report.html"
    return (folders[0] / name).read_text(encoding="utf-8")


def found_at(origin: str, folders: tuple[Path, ...]) -> Any:
    """Return the value at a place in a file of a run, without the report's own code."""
    place, pointer = origin.split("#/", 1)
    number, file = place.split(":", 1)
    path = folders[int(number)] / file
    text = path.read_text(encoding="utf-8")
    value = (
        [json.loads(line) for line in text.split("\n") if line]
        if path.suffix == ".jsonl"
        else json.loads(text)
    )
    for key in pointer.split("/"):
        key = key.replace("~1", "/").replace("~0", "~")
        value = value[int(key)] if isinstance(value, list) else value[key]
    return value


def check_figures(page: str, *folders: Path) -> int:
    """Check that every figure is what its file holds; return their number."""
    figures = Reader(page).figures
    for origin, exact, shown in figures:
        value = found_at(origin, folders)
        assert float(exact) == value, origin
        number = shown.replace("\u00a0%", "").replace(",", "")
        scale = 100 if "%" in shown else 1
        digits = len(number.partition(".")[2])
        assert float(number) == pytest.approx(scale * value, abs=0.5001 * 10**-digits), origin
    return len(figures)


def test_every_number_is_the_runs_own(tmp_path: Path) -> None:
    run = write_pipeline(tmp_path / "run")
    page = page_of(run)
    assert check_figures(page, run) > 100
    origins = {origin for origin, _, _ in Reader(page).figures}
    for place in ("ppo_ptx/right", "best_of_8/right", "ppo_ptx/right_gain_vs_sft_interval/0"):
        assert f"0:results.json#/{place}" in origins
    assert "0:rm/results.json#/pair_accuracy" in origins
    assert "0:samples.jsonl#/3/rm" in origins
    points = json.loads(Reader(page).scripts[0])
    logged = [json.loads(line) for line in (run / "ppo_ptx/metrics.jsonl").open()]
    (line,) = [
        line for one in points.values() for line in one["lines"] if line["key"] == "ppo/entropy"
    ]
    assert line["origin"] == "0:ppo_ptx/metrics.jsonl"
    kept = [row for row in logged if row["ppo/entropy"] != "nan"]
    assert line["x"] == [row["step"] for row in kept]
    assert line["y"] == [row["ppo/entropy"] for row in kept]


def test_the_verdict_puts_substance_before_the_win_rate(tmp_path: Path) -> None:
    run = write_pipeline(tmp_path / "run")
    text = " ".join(Reader(page_of(run)).text.split())
    right = text.index("ppo_ptx is more often right than sft: 83.8 % of its responses against 56.7")
    assert right < text.index("Win rate against sft by gold: 84.1 % (81.2 % to 86.6 %)")
    assert "the best of 8 responses of sft by the reward model is right in 73.7 %" in text


def test_what_a_gain_is_at_equal_length_stands_beside_it(tmp_path: Path) -> None:
    run = write_pipeline(tmp_path / "run")
    page = page_of(run)
    reader = Reader(page)
    text = " ".join(reader.text.split())
    assert (
        "Win rate against sft by gold: 84.1 % (81.2 % to 86.6 %). The gain in score is 1.254, and "
        "at equal length 0.928 (0.741 to 1.115)."
    ) in text
    rows = re.findall(r'<th scope="row">([^<]*)</th>', page)
    assert rows[rows.index("gold score, gain") + 1] == "gold score, gain at equal length"
    place = "0:results.json#/ppo_ptx/gold_gain_at_equal_length_vs_sft"
    told = [(origin, shown) for origin, _, shown in reader.figures if origin.startswith(place)]
    of_both = [(place, "0.928"), (f"{place}_interval/0", "0.741"), (f"{place}_interval/1", "1.115")]
    assert told == [*of_both, *of_both]  # once in the verdict, once in the table of all figures


@pytest.mark.parametrize(
    ("gain", "words", "tone"),
    [
        ([-0.2, -0.1], "ppo_ptx is less often right than sft", "bad"),
        ([-0.1, 0.1], "ppo_ptx is about as often right as sft", "unclear"),
        ([0.1, 0.2], "ppo_ptx is more often right than sft", "good"),
    ],
)
def test_a_win_rate_does_not_hide_what_is_wrong(
    tmp_path: Path, gain: list[float], words: str, tone: str
) -> None:
    run = write_pipeline(tmp_path / "run")
    results = json.loads((run / "results.json").read_text())
    results["ppo_ptx"]["right_gain_vs_sft_interval"] = gain
    write_json(run / "results.json", results)
    page = page_of(run)
    assert words in page
    assert f'class="verdict {tone}"' in page


def test_drawings_have_tables_of_their_numbers(tmp_path: Path) -> None:
    run = write_pipeline(tmp_path / "run")
    page = page_of(run)
    origins = {origin for origin, _, _ in Reader(page).figures}
    assert {f"0:rm/results.json#/calibration/{i}/confidence" for i in range(3)} <= origins
    assert "0:rm/results.json#/calibration/1/accuracy" not in origins  # it is not a number
    assert {f"0:results.json#/best_of/by_n/{n}/gold_score" for n in (1, 8)} <= origins
    assert check_figures(page, run) > 100


def test_without_an_independent_judge_the_verdict_is_open(tmp_path: Path) -> None:
    figures = {"rm_score": 0.5, "win_rate_vs_sft": 0.9, "win_rate_vs_sft_interval": [0.8, 0.95]}
    run = write_pipeline(
        tmp_path / "run", judge="rm", judges=["rm"], sft={"rm_score": 0.1}, ppo_ptx=figures
    )
    page = page_of(run)
    assert "no independent judge was asked" in page
    assert 'class="verdict unclear"' in page


def test_warnings_of_the_evaluation_are_told(tmp_path: Path) -> None:
    warning = {"code": "EVAL_PARTS", "policy": "ppo_ptx", "message": "gains & <loses>"}
    page = page_of(write_pipeline(tmp_path / "run", warnings=[warning]))
    assert "<b>EVAL_PARTS</b> gains &amp; &lt;loses&gt;" in page
    assert 'class="verdict mixed"' in page


def test_texts_of_models_are_shown_and_do_nothing(tmp_path: Path) -> None:
    page = page_of(write_pipeline(tmp_path / "run"))
    reader = Reader(page)
    tags = [tag for tag, _ in reader.elements]
    assert tags.count("script") == 2 and "img" not in tags and "b" not in tags
    handlers = [name for _, attrs in reader.elements for name in attrs if name.startswith("on")]
    assert handlers == []
    for text in HOSTILE[:5]:
        assert f"says {text}" in reader.text
    assert "U+202E" in reader.text and "\u202e" not in page and "\x00" not in page
    assert "98,000 more characters" not in page and "more characters]" in page
    assert page.encode("utf-8")


def test_the_page_fetches_nothing_and_names_all_that_runs(tmp_path: Path) -> None:
    page = page_of(write_pipeline(tmp_path / "run"))
    reader = Reader(page)
    for _, attrs in reader.elements:
        assert not {"src", "srcset", "action", "style"} & attrs.keys()
        assert str(attrs.get("href", "#")).startswith("#")
    (policy,) = [
        attrs["content"]
        for tag, attrs in reader.elements
        if tag == "meta" and attrs.get("http-equiv") == "Content-Security-Policy"
    ]
    here = ROOT / "tools/report"
    assert policy == content_policy(
        (here / "page.css").read_text(encoding="utf-8"), (here / "page.js").read_text("utf-8")
    )
    assert "unsafe" not in str(policy) and "http:" not in page.replace("http-equiv", "")


@pytest.mark.slow
def test_equal_runs_give_equal_bytes(tmp_path: Path) -> None:
    """This holds at another time, in another process, and if sets have another order."""
    run = write_pipeline(tmp_path / "run")
    other = write_pipeline(tmp_path / "other")
    pages = []
    for seed in ("1", "2"):
        command = [sys.executable, "-m", "tools.report", str(run), str(other)]
        subprocess.run(command, check=True, env={**os.environ, "PYTHONHASHSEED": seed})
        pages.append((run / "report_vs_other.html").read_bytes())
        for file in run.rglob("*"):
            os.utime(file, (0, 0))
    assert pages[0] == pages[1]


def test_a_long_run_has_a_small_page_with_all_its_points(tmp_path: Path) -> None:
    folder = write_long_ppo(tmp_path, num_updates=1_000, num_samples=500)
    page = page_of(folder)
    assert len(page.encode()) < 5_000_000
    lines = [line for one in json.loads(Reader(page).scripts[0]).values() for line in one["lines"]]
    assert {len(line["x"]) for line in lines} == {1_000}
    assert "Thinned out" not in page
    assert "16 of 250 prompts: the first of the file" in Reader(page).text
    assert check_figures(page, folder) > 16


def test_a_longer_run_is_thinned_out_but_for_its_extremes_and_alarms(tmp_path: Path) -> None:
    folder = write_long_ppo(tmp_path, num_updates=12_000, num_samples=16)
    rows = [{"step": i, "ppo/kl": 9.75 if i == 3_001 else i % 2} for i in range(12_000)]
    write_rows(folder / "metrics.jsonl", rows)
    page = page_of(folder)
    (panel,) = json.loads(Reader(page).scripts[0]).values()
    (line,) = panel["lines"]
    assert line["x"][0] == 0 and line["x"][-1] == 11_999 and len(line["x"]) <= MAX_POINTS
    assert all(line["y"][line["x"].index(x)] == rows[x]["ppo/kl"] for x in line["x"])
    assert max(line["y"]) == line["y"][line["x"].index(3_001)] == 9.75
    assert "Thinned out to 1,000 points or less" in page
    assert "metrics.jsonl has all 12,000" in page
    paths = [attrs["d"] for _, attrs in Reader(page).elements if attrs.get("class") == "alarm"]
    tips = [int(str(path).split(",")[0][1:]) + 4 for path in paths]
    assert tips == list(range(LEFT, WIDTH - RIGHT + 1))  # 1,200 alarms, one mark on every pixel


def test_thinning_out_keeps_the_ends_and_extremes_of_every_stretch() -> None:
    values = [3.0, 9.0, 4.0, 1.0, 5.0, 5.0, 5.0, 5.0, 2.0, 6.0, 7.0, 8.0]
    assert thin_out(values, most=12) == list(range(12))
    assert thin_out(values, most=8) == [0, 1, 3, 5, 6, 8, 11]
    assert thin_out(values, most=4) == [0, 1, 3, 11]


def test_of_a_huge_file_of_samples_the_ends_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tools.report.folders, "MAX_ROWS", 6)
    folder = write_ppo(tmp_path)
    rows = [
        {"step": step, "prompt": f"Prompt {i}", "response": "Yes.", "score": step + i / 8}
        for step in range(10)
        for i in range(3)
    ]
    write_rows(folder / "samples.jsonl", rows)
    page = page_of(folder)
    text = " ".join(Reader(page).text.split())
    assert "ppo_ptx, update 0" in text and "ppo_ptx, update 9" in text and "update 5" not in text
    assert "samples.jsonl has 24 rows more, between the first and the last 3" in text
    assert "0:samples.jsonl#/29/score" in {origin for origin, _, _ in Reader(page).figures}
    assert check_figures(page, folder) > 6


def test_a_killed_run_says_so_with_its_alarm(tmp_path: Path) -> None:
    alarm = {"step": 7, "code": "PPO_NEG_KL", "message": "The KL is -0.4. Look for what differs."}
    late = [{"step": i, "code": "PPO_KL", "message": "The KL is high."} for i in (4, 5)]
    folder = write_ppo(tmp_path, last_update=7, alarms=[*late, alarm])
    page = page_of(folder)
    text = Reader(page).text
    assert "ppo_ptx was stopped by PPO_NEG_KL at update 7" in text
    assert "The last update that it logged is 7 of 24" in text
    assert "The KL is -0.4. Look for what differs. This ended the run." in text
    assert "PPO_KL at update 4 and 1 more" in text
    assert page.count('class="alarm"') == 3
    assert check_figures(page, folder) > 0


def test_a_run_without_alarms_that_died_says_how_far_it_came(tmp_path: Path) -> None:
    page = page_of(write_ppo(tmp_path, last_update=7))
    assert "ppo_ptx is not finished, and no process is at work in it" in page


def test_a_run_at_work_says_so(tmp_path: Path) -> None:
    folder = write_ppo(tmp_path, last_update=7)
    holder = {"pid": os.getpid(), "host": socket.gethostname(), "since": "now"}
    write_json(folder / ".rlhf_run.lock", holder)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "ppo/sco')  # a row that the run is still writing
    page = page_of(folder)
    assert "ppo_ptx is at work. The last update that it logged is 7 of 24" in page


def test_a_value_that_was_not_finite_is_named(tmp_path: Path) -> None:
    folder = write_ppo(tmp_path, last_update=7)
    fault = {"update": 8, "phase": "rollout", "tensor": "values", "step": None}
    write_json(folder / "nonfinite.json", fault)
    assert "values was not finite in phase rollout of update 8" in page_of(folder)


@pytest.mark.parametrize(
    ("write", "name", "words"),
    [
        (write_sft, "sft", "SFT: loss on held-out demonstrations 0.507 nats a token, from 0.669."),
        (write_rm, "rm", "The reward model orders 71.0\u00a0% (68.7\u00a0% to 73.3\u00a0%)"),
        (write_rm, "rm", "That is clearly above the length baseline (shorter wins)"),
        (
            write_collect,
            "rankings",
            "Two labelers agree on 74.1\u00a0% (72.1\u00a0% to 76.0\u00a0%)",
        ),
        (write_ppo, "ppo_ptx", "ppo_ptx: the mean score ended at 1.188"),
    ],
)
def test_a_single_stage_has_a_page(tmp_path: Path, write: Any, name: str, words: str) -> None:
    write(tmp_path)
    page = page_of(tmp_path / name)
    assert words in Reader(page).text
    assert check_figures(page, tmp_path / name) > 0


def test_a_folder_of_data_without_results_is_no_unfinished_stage(tmp_path: Path) -> None:
    run = write_pipeline(tmp_path / "run")
    mark = {"format": 1, "program": "data.smollm2", "files": ["config.json"], "settings": {}}
    write_json(run / "base/.rlhf_run.json", mark)
    assert "is more often right" in page_of(run)


def test_two_runs_show_first_what_differs(tmp_path: Path) -> None:
    first, second = write_pipeline(tmp_path / "a"), write_pipeline(tmp_path / "b")
    write_ppo(second, kl_coef=0.1)
    page = page_of(first, second)
    text = " ".join(Reader(page).text.split())
    assert "ppo_ptxppo.kl_coef0.050.1" in text[: text.index("is more often right")]
    assert text.index("What differs") < text.index("is more often right")
    assert check_figures(page, first, second) > 200
    assert not (first / "report.html").exists()


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    folders = [write_pipeline(tmp_path / name / "tiny") for name in ("x", "y")]
    page_of(*folders)
    assert main([str(folder) for folder in folders] + ["--output", str(tmp_path / "p.html")]) == 0
    page = (tmp_path / "p.html").read_text(encoding="utf-8")
    assert f"ppo_ptx, {folders[0]}" in page and f"ppo_ptx, {folders[1]}" in page


def test_inputs_that_were_made_anew_since_are_told(tmp_path: Path) -> None:
    run = write_pipeline(tmp_path / "run")
    lineage = json.loads((run / "rm/lineage.json").read_text())
    lineage["inputs"]["policy"]["lineage_sha256"] = "0" * 64
    write_json(run / "rm/lineage.json", lineage)
    (changed,) = [one for one in find_inputs(read_run(run)) if one.is_changed]
    assert (changed.stage, changed.name, changed.source) == ("rm", "policy", "sft")
    assert "edge changed" in page_of(run)


def broken_inputs(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    yield tmp_path / "nowhere", "does not exist; give the folder of a run"
    (tmp_path / "empty").mkdir()
    yield tmp_path / "empty", "holds no run"
    (tmp_path / "file").write_text("x")
    yield tmp_path / "file", "is a file; give the folder of a run"
    write_sft(tmp_path / "cut")
    (tmp_path / "cut/sft/results.json").write_text('{"held_out')
    yield tmp_path / "cut", "results.json is not complete JSON"
    write_sft(tmp_path / "rows")
    (tmp_path / "rows/sft/metrics.jsonl").write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    yield tmp_path / "rows", "metrics.jsonl, line 2 is not JSON"


def test_what_is_no_run_gets_one_message_and_no_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder, words in broken_inputs(tmp_path):
        assert main([str(folder)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ") and words in line, line
        assert not list(tmp_path.rglob("*.html*"))


def test_a_file_of_somebody_else_is_not_replaced(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_sft(tmp_path)
    (tmp_path / "sft/report.html").write_text("<html>mine</html>")
    assert main([str(tmp_path / "sft")]) == 2
    assert "was not written by this program" in capsys.readouterr().err
    assert (tmp_path / "sft/report.html").read_text() == "<html>mine</html>"


def test_settings_are_compared_with_the_nearest_preset(tmp_path: Path) -> None:
    preset = str(ROOT / "configs/rm/tiny.yaml")
    config = load_config(
        RMConfig, ["--config", preset, "--num_epochs", "3", "--output_dir", "x/rm"]
    )
    write_rm(tmp_path)
    settings = settings_in_use(config)
    (tmp_path / "rm/config.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    text = " ".join(Reader(page_of(tmp_path / "rm")).text.split())
    assert "against the preset tiny" in text
    assert "num_epochs31" in text


def test_curves_of_two_stages_meet_in_a_panel_and_gaps_are_left_out(tmp_path: Path) -> None:
    logs: dict[str, list[dict[str, Any]]] = {
        "ppo": [{"step": 0, "ppo/kl": 0.0}, {"step": 1}, {"step": 2, "ppo/kl": "nan"}],
        "ppo_ptx": [{"step": 0, "ppo/kl": 0.5}, {"step": 5, "ppo/kl": 1.5}],
    }
    for name, rows in logs.items():
        shutil.copytree(write_ppo(tmp_path / "one"), tmp_path / "run" / name)
        write_rows(tmp_path / "run" / name / "metrics.jsonl", rows)
    panel = next(panel for panel in PANELS if "ppo/kl" in panel.lines)
    curves = find_curves(panel, [read_run(tmp_path / "run")], ["sft", "ppo", "ppo_ptx"])
    assert [(one.label, one.steps, one.values, one.rank) for one in curves] == [
        ("ppo", [0], [0.0], 1),
        ("ppo_ptx", [0, 5], [0.5, 1.5], 2),
    ]
    assert running_mean([1.0, 3.0, 5.0, 7.0], 1) == [2.0, 3.0, 5.0, 6.0]


def test_new_words_are_marked() -> None:
    pieces = mark_new("Gladly! Anna has a fox.", "Anna has a cat.")
    assert [(one.text, one.is_new) for one in pieces] == [
        ("Gladly! ", True),
        ("Anna has a ", False),
        ("fox", True),
        (".", False),
    ]
    assert show_text("a\x00b\tc\nd") == "a\u2400b\tc\nd"


def test_panels_show_described_metrics_and_known_alarms() -> None:
    for panel in PANELS:
        assert panel.title and set(panel.lines) <= METRICS.keys() and set(panel.codes) <= set(CODES)
    (ends,) = [panel for panel in PANELS if "ppo/eos_rate" in panel.lines]
    described = ("Responses that end", "share of responses", (0.9, 1.0))
    assert (ends.title, ends.unit, ends.healthy) == described
    shown = {panel.title for panel in PANELS}
    assert {metric.title for metric in METRICS.values() if metric.title} <= shown


def test_the_verdict_is_that_of_the_evaluation_in_the_runs_own_folder(tmp_path: Path) -> None:
    """One in a folder below, such as of other prompts, does not replace it, whatever its name."""
    run = write_pipeline(tmp_path / "run")
    for name in ("another", "unlike"):
        (run / name).mkdir()
        for path in run.iterdir():
            if path.is_file():
                shutil.copy(path, run / name)
    evaluations = read_run(run).of("evaluate")
    assert len(evaluations) == 3
    found = read_run(run).evaluation
    assert found is not None and found.folder == run
