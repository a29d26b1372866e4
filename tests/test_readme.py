"""The commands of README and of the pages in docs/ exist: targets, modules, options and files.

The pages of docs/experiments are left out, because they say what was run at their time.
"""

import importlib
import importlib.util
import json
import re
import runpy
import shlex
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from rlhf.inputs.files import HUB
from rlhf.runs.settings import load_config
from stages.ppo.config import Config
from tools.__main__ import GROUPS, programs_of

ROOT = Path(__file__).parents[1]
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md"))
}
MAKEFILE = "".join(
    (ROOT / name).read_text(encoding="utf-8") for name in ("Makefile", ".ci/development.mk")
)

TARGETS = set(re.findall(r"^([a-z-]+):.*## ", MAKEFILE, flags=re.MULTILINE))
STAGE_OF_TARGET = {"ppo-ptx": "ppo"}
BLOCK = re.compile(r"^```(?:bash|sh)\n(.*?)^```", flags=re.MULTILINE | re.DOTALL)
BLOCKS = [block for text in PAGES.values() for block in BLOCK.findall(text)]
INLINE = [
    command
    for text in PAGES.values()
    for command in re.findall(r"`((?:make|python -m|instruct-rlhf) [^`\n]+)`", text)
]
LINES = [line for block in BLOCKS for line in block.replace("\\\n", " ").splitlines()]
COMMANDS = sorted({line.split("  #")[0].strip() for line in [*LINES, *INLINE] if line.strip()})
MAKE = [command for command in COMMANDS if command.startswith("make ")]
PYTHON = [command for command in COMMANDS if " -m " in command and "pip" not in command]
BY_NAME = [command for command in COMMANDS if command.startswith("instruct-rlhf ")]
MODULES = {program.name: program.module for group in GROUPS for program in programs_of(group)}


def options_of(words: list[str]) -> list[str]:
    return [word.split("=")[0] for word in words if word.startswith("--")]


def assert_options_exist(
    module: str, options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Check that the module's --help has each option, except names that the user chooses."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr(sys, "argv", [module, "--help"])
        runpy.run_module(module, run_name="__main__")
    assert end.value.code == 0
    known = set(re.findall(r"--[\w.-]+", capsys.readouterr().out))
    missing = [
        option
        for option in options
        if option not in known and option.rpartition(".")[0] not in known
    ]
    assert missing == [], f"{module} has no {missing}"


def test_pages_show_commands() -> None:
    assert {"make quick-look", "make pipeline", "make test"} <= set(MAKE)
    assert any(command.startswith("accelerate launch ") for command in PYTHON)


def test_the_readme_is_short_and_shows_how_to_train_on_own_data() -> None:
    assert len(PAGES["README.md"].splitlines()) <= 130
    own_data = BLOCK.findall(PAGES["README.md"])[-1].replace("\\\n", " ").splitlines()
    stages = [shlex.split(command)[2] for command in own_data]
    assert stages == ["stages.sft", "stages.rm", "stages.ppo", "stages.evaluate"]


@pytest.mark.parametrize("command", MAKE)
def test_make_command_exists(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = shlex.split(command)[1:]
    variables = dict(word.split("=", 1) for word in words if "=" in word)
    goals = [word for word in words if "=" not in word]
    assert set(goals) <= TARGETS
    assert all(re.search(rf"^{name}\b|\$\({name}\)", MAKEFILE, re.MULTILINE) for name in variables)
    if "PRESET" in variables:
        assert list(ROOT.glob(f"configs/*/{variables['PRESET']}.yaml"))
    if "ACCELERATE" in variables:
        assert (ROOT / variables["ACCELERATE"]).is_file()
    if options := options_of(variables.get("ARGS", "").split()):
        for goal in goals:
            stage = STAGE_OF_TARGET.get(goal, goal)
            assert_options_exist(f"stages.{stage}", options, capsys)


@pytest.mark.parametrize("command", BY_NAME)
def test_command_by_name_exists(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    _, name, *rest = shlex.split(command)
    test_module_command_exists(shlex.join(["python", "-m", MODULES[name], *rest]), capsys)


@pytest.mark.parametrize("command", PYTHON)
@pytest.mark.slow
def test_module_command_exists(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = shlex.split(command)
    place = words.index("-m")
    module, rest = words[place + 1], words[place + 2 :]
    assert importlib.util.find_spec(module) is not None
    for option, path in pairwise(words):
        if option in ("--config", "--config_file"):
            assert path == "FILE" or (ROOT / path).is_file()
        if option == "--input":
            assert path.startswith(HUB) or (ROOT / path).exists()
    options = options_of(rest)
    if module == "tools.plan" and "--config" in rest:
        # It takes the options of the stage whose settings it reads.
        stage = Path(rest[rest.index("--config") + 1]).parent.name
        assert_options_exist(f"stages.{stage}", [o for o in options if o != "--accelerate"], capsys)
        options = [option for option in options if option == "--accelerate"]
    assert_options_exist(module, options, capsys)
    if module.startswith("stages.") and rest and "--help" not in rest:
        load_config(importlib.import_module(f"{module}.config").Config, rest)


def blocks_of(language: str) -> list[str]:
    """Return the blocks in a language on the page about rewards."""
    page = PAGES["docs/rewards.md"]
    return re.findall(rf"^```{language}\n(.*?)^```", page, flags=re.MULTILINE | re.DOTALL)


def test_own_rewards_do_what_is_said_of_them() -> None:
    own: dict[str, Any] = {}
    [block] = blocks_of("python")
    exec(block, own)
    batch: tuple[Any, ...] = (["p", "p"], ["one two three", ""], [{}, {}])
    assert own["brevity"](*batch) == [-0.3, 0.0]
    tokens = [["so", " so", " so", "</s>"], ["</s>"]]
    assert own["no_repeats"](*batch, tokens) == [[0.0, 0.0, -1.0, 0.0], [0.0]]


def test_own_reward_settings_load(tmp_path: Path) -> None:
    weights = []
    for number, block in enumerate(blocks_of("yaml")):
        path = tmp_path / f"reward{number}.yaml"
        path.write_text(block, encoding="utf-8")
        defaults = ["--config", str(ROOT / "configs/ppo/tiny.yaml"), "--reward.model", "null"]
        reward = load_config(Config, [*defaults, "--config", str(path)]).reward
        weights.append({name: part.weight for name, part in reward.parts.items()})
    assert weights == [
        {"helpful": 1.0, "brief": 0.5, "repeats": 0.1},
        {"harmless": 1.0, "follows": 2.0},
    ]


def test_the_table_of_speed_holds_what_was_measured() -> None:
    """It shows median, smallest and largest ratios of time, and ratios of memory, rounded."""
    results = json.loads((ROOT / "benchmarks/results/results.json").read_text(encoding="utf-8"))
    rows = {row["name"]: row for row in results}
    measured = r"^\|.*\| ([\d.]+) \(([\d.]+)-([\d.]+)\) \| ([\d.]+) \|$"
    shown = re.findall(measured, PAGES["docs/performance.md"], flags=re.MULTILINE)
    names = ("rm_k9", "rm_k4", "rm_k2", "ppo_fp32", "ppo_eos")
    assert rows["ppo_best"]["time_ratio"] == rows["ppo_fp32"]["time_ratio"]
    for name, texts in zip(names, shown, strict=True):
        row = rows[name]
        pairs = zip(row["ours"]["seconds"], row["theirs"]["seconds"], strict=True)
        ratios = [theirs / ours for ours, theirs in pairs]
        figures = [row["time_ratio"], min(ratios), max(ratios), row["memory_ratio"]]
        digits = [len(text.partition(".")[2]) for text in texts]
        rounded = [f"{figure:.{count}f}" for figure, count in zip(figures, digits, strict=True)]
        assert list(texts) == rounded, name
