"""Every shipped settings file loads, and names only what its stage reads."""

import ast
import importlib
from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file

from rlhf.runs.settings import load_config

ROOT = Path(__file__).parents[1]
LAUNCHER = sorted((ROOT / "configs" / "accelerate").glob("*.yaml"))
TASKS = set((ROOT / "configs" / "benchmark" / "tasks").glob("*.yaml"))
"""Tasks in the format of lm-evaluation-harness, which test_benchmark_harness.py reads."""
SETTINGS = sorted(set((ROOT / "configs").rglob("*.yaml")) - set(LAUNCHER) - TASKS)
STAGES = sorted(path.parent.name for path in (ROOT / "stages").glob("*/__main__.py"))


def config_class_of(stage: str) -> type[Any]:
    return importlib.import_module(f"stages.{stage}.config").Config


@pytest.mark.parametrize("path", SETTINGS, ids=lambda path: str(path.relative_to(ROOT)))
def test_stage_settings_load(path: Path) -> None:
    config = load_config(config_class_of(path.parent.name), ["--config", str(path)])
    # harmless_judge is a second run of the preset harmless, so its folder lies in runs/harmless.
    runs, preset, *_ = Path(config.output_dir).parts
    assert runs == "runs"
    assert path.stem.startswith(preset)


def test_every_stage_has_the_default_preset() -> None:
    assert {path.parent.name for path in SETTINGS if path.stem == "tiny"} == set(STAGES)


@pytest.mark.parametrize("path", LAUNCHER, ids=lambda path: path.stem)
def test_launcher_settings_load(path: Path) -> None:
    config = load_config_from_file(str(path))
    settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert config.num_processes == settings["num_processes"]


def test_every_setting_has_a_description() -> None:
    """The text under a field is its --help, and its only description."""
    files = [*ROOT.glob("stages/*/config.py"), *ROOT.glob("experiments/*.py")]
    files += [*ROOT.glob("data/**/*.py"), *ROOT.glob("tools/**/*.py")]
    files += ROOT.glob("rlhf/*/settings.py")
    bare = [
        f"{path.relative_to(ROOT)}: {name}" for path in files for name in fields_without_text(path)
    ]
    assert len(files) > len(STAGES)
    assert bare == []


def fields_without_text(path: Path) -> list[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    classes = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    return [
        f"{owner.name}.{ast.unparse(statement.target)}"
        for owner in classes
        if owner.name.endswith(("Config", "Settings"))
        for statement, following in zip(owner.body, [*owner.body[1:], None], strict=True)
        if isinstance(statement, ast.AnnAssign) and not is_text(following)
    ]


def is_text(node: ast.stmt | None) -> bool:
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )


def test_a_quick_look_keeps_rankings_with_a_response_that_was_cut() -> None:
    """Its end token makes it longer than what was sampled, and a small policy has many of them:
    the reward model stopped, since a ranking in twelve was over the limit."""
    rm, collect = (
        yaml.safe_load((ROOT / f"configs/{stage}/quick.yaml").read_text(encoding="utf-8"))
        for stage in ("rm", "collect")
    )
    assert rm["max_response_tokens"] > collect["max_new_tokens"]
