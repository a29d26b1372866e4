"""Find which settings of a run differ from its preset, and from those of another run."""

import functools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from rlhf.runs.folder import flat_settings
from rlhf.runs.settings import RUN_DIR, load_config, settings_in_use
from stages.collect.config import Config as CollectConfig
from stages.evaluate.config import Config as EvaluateConfig
from stages.ppo.config import Config as PPOConfig
from stages.pretrain.config import Config as PretrainConfig
from stages.rm.config import Config as RMConfig
from stages.sft.config import Config as SFTConfig
from tools.report.folders import EVALUATE, RunFolder, Stage

PRESETS = Path(__file__).parents[2] / "configs"
CONFIGS: Mapping[str, type] = {
    "pretrain": PretrainConfig,
    "sft": SFTConfig,
    "collect": CollectConfig,
    "rm": RMConfig,
    "ppo": PPOConfig,
    EVALUATE: EvaluateConfig,
}
PLACES = ("run_dir", "output_dir", "overwrite", "force")
"""Settings that say where a run writes, not what it does."""
ROOT = "RUN"
"""Stands in a path for the folder that holds the stages of a run."""


@dataclass(frozen=True)
class ComparedSetting:
    """One setting of a stage."""

    name: str
    value: str
    preset: str | None
    """The preset's value if it is another one; otherwise None."""


@dataclass(frozen=True)
class ComparedStage:
    """All settings of a stage, compared with the nearest preset."""

    stage: Stage
    preset: str | None
    """Name of the preset; None if there is none for this stage."""
    settings: list[ComparedSetting]

    @property
    def changed(self) -> list[ComparedSetting]:
        return [one for one in self.settings if one.preset is not None]


@dataclass(frozen=True)
class Difference:
    """A setting that two runs of one stage do not share."""

    stage: str
    name: str
    values: list[str]
    """Its value in each run, in the order of the runs."""


def compare_with_presets(run: RunFolder) -> list[ComparedStage]:
    """Compare all settings of each stage with those of the run's nearest preset.

    A run does not record which files its settings came from. So the nearest preset is the one whose
    files name the fewest other values, over all stages.
    """
    stages = [stage for stage in run.stages if stage.settings]
    preset = _nearest_preset(stages)
    return [_compare(stage, preset) for stage in stages]


def _compare(stage: Stage, preset: str | None) -> ComparedStage:
    own = _comparable(stage.settings, stage.stage)
    path = PRESETS / stage.stage / f"{preset}.yaml"
    if stage.stage not in CONFIGS or not path.is_file():
        return ComparedStage(
            stage, None, [ComparedSetting(k, _shown(v), None) for k, v in own.items()]
        )
    whole = settings_in_use(load_config(CONFIGS[stage.stage], ["--config", str(path)]))
    theirs = _comparable(whole, stage.stage)
    settings = [
        ComparedSetting(
            key, _shown(value), _shown(theirs.get(key)) if theirs.get(key) != value else None
        )
        for key, value in own.items()
    ]
    return ComparedStage(stage, preset, settings)


def compare_runs(runs: Sequence[RunFolder]) -> list[Difference]:
    """Return the settings that differ between runs, for stages that all of them have."""
    first, *others = runs
    differences = []
    for stage in first.stages:
        partners = [_partner(stage, other) for other in others]
        if any(partner is None for partner in partners):
            continue
        flat = [
            _comparable(one.settings, one.stage) for one in [stage, *partners] if one is not None
        ]
        for name in dict.fromkeys(key for of in flat for key in of):
            values = [of.get(name) for of in flat]
            if any(value != values[0] for value in values):
                differences.append(
                    Difference(stage.name, name, [_shown(value) for value in values])
                )
    return differences


def _partner(stage: Stage, run: RunFolder) -> Stage | None:
    """Return the same stage of another run: the one of that name, or else the only one."""
    alike = run.of(stage.stage)
    named = [one for one in alike if one.name == stage.name]
    return named[0] if named else alike[0] if len(alike) == 1 else None


def _nearest_preset(stages: Sequence[Stage]) -> str | None:
    """Return the preset with the smallest share of other values; None without any preset."""
    counts: dict[str, tuple[int, int]] = {}
    for stage in stages:
        own = _comparable(stage.settings, stage.stage)
        for path in (PRESETS / stage.stage).glob("*.yaml") if stage.stage in CONFIGS else ():
            named = _comparable(_settings_in(path), stage.stage)
            others = sum(own.get(key) != value for key, value in named.items())
            so_far = counts.get(path.stem, (0, 0))
            counts[path.stem] = (so_far[0] + others, so_far[1] + len(named))
    shares = {name: (others / num, -num, name) for name, (others, num) in counts.items() if num}
    return min(shares, key=lambda name: shares[name]) if shares else None


@functools.cache
def _settings_in(preset: Path) -> dict[str, Any]:
    return yaml.safe_load(preset.read_text(encoding="utf-8"))


def _comparable(settings: Mapping[str, Any], stage: str) -> dict[str, Any]:
    """Return settings by name, without where they write and with paths relative to the run."""
    output = str(settings.get("output_dir", ""))
    parent = output if stage == EVALUATE else os.path.dirname(os.path.normpath(output))
    roots = [str(root) for root in (settings.get("run_dir"), RUN_DIR, parent) if root]
    return {
        name: _relative(value, roots)
        for name, value in flat_settings(settings)
        if name not in PLACES
    }


def _relative(value: Any, roots: Sequence[str]) -> Any:
    if isinstance(value, list | tuple):
        return [_relative(one, roots) for one in value]
    if isinstance(value, str):
        for root in roots:
            if value.startswith(root.rstrip("/") + "/"):
                return ROOT + value[len(root.rstrip("/")) :]
    return value


def _shown(value: Any) -> str:
    return (
        "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    )
