"""make runs what is stale and nothing else, and ARGS reach the named stage alone.

The launcher is replaced by a script that notes its command and writes results.json.
"""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

FAKE = """#!/bin/sh
if [ "$2" = stages.together ]; then shift 2; exec "$@"; fi
for word in "$@"; do
    case $before in
        --config) output=${output:-$(sed -n 's/^output_dir: //p' "$word")} ;;
        --output_dir) output=$word ;;
    esac
    before=$word
done
echo "$@" >> commands
mkdir -p "$output"
echo "{}" > "$output/results.json"
"""


class Checkout:
    """A copy of what make reads, with the fake launcher."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        shutil.copy(ROOT / "Makefile", folder)
        shutil.copytree(ROOT / "configs", folder / "configs")
        (folder / ".venv").mkdir()
        for name in ("pyproject.toml", "constraints.txt", ".venv/.installed"):
            (folder / name).touch()
        for name in ("accelerate", "python"):
            (folder / name).write_text(FAKE)
            (folder / name).chmod(0o755)
        self.age()

    def make(self, *words: str) -> list[str]:
        """What make ran, without the launcher's part."""
        log = self.folder / "commands"
        log.write_text("")
        command = ["make", "--silent", f"BIN={self.folder}", *words]
        environment = {"PATH": os.environ["PATH"]}
        run = subprocess.run(
            command, cwd=self.folder, env=environment, capture_output=True, text=True
        )
        assert run.returncode == 0, run.stderr
        return [line.split("-m ", 1)[1] for line in log.read_text().splitlines()]

    def age(self) -> None:
        """Move all times back, so that what is touched next is newer on any file system."""
        for path in self.folder.rglob("*"):
            times = path.stat()
            os.utime(path, (times.st_atime - 10, times.st_mtime - 10))

    def touch(self, path: str) -> None:
        self.age()
        (self.folder / path).touch()


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    return Checkout(tmp_path)


def stages_of(commands: list[str]) -> list[str]:
    return [command.split()[0] for command in commands]


def test_pipeline_runs_every_stage_once_and_in_order(checkout: Checkout) -> None:
    commands = checkout.make("pipeline")
    assert stages_of(commands) == [
        "data.tinyworld",
        "stages.pretrain",
        "stages.sft",
        "stages.collect",
        "stages.rm",
        "stages.ppo",
        "stages.ppo",
        "stages.evaluate",
    ]
    # The two PPO runs go side by side: either may start first.
    assert sorted(commands[5:7]) == [
        "stages.ppo --config configs/ppo/tiny.yaml --overwrite",
        "stages.ppo --config configs/ppo/tiny.yaml --overwrite --ptx.coef 0"
        " --output_dir runs/tiny/ppo",
    ]
    assert checkout.make("pipeline") == []


def test_quick_look_is_the_same_chain_with_settings_of_its_own(checkout: Checkout) -> None:
    commands = checkout.make("quick-look")
    assert stages_of(commands) == stages_of(checkout.make("pipeline"))
    assert all("runs/tiny" not in command and "tiny.yaml" not in command for command in commands)
    assert checkout.make("quick-look") == []


def test_changed_settings_make_their_stage_and_the_later_ones_stale(checkout: Checkout) -> None:
    checkout.make("pipeline")
    checkout.touch("configs/rm/tiny.yaml")
    assert stages_of(checkout.make("sft")) == []
    stale = stages_of(checkout.make("pipeline"))
    assert stale == ["stages.rm", "stages.ppo", "stages.ppo", "stages.evaluate"]


def test_args_reach_the_named_stage_alone_and_make_it_stale(checkout: Checkout) -> None:
    args = "ARGS=--optim.betas [0.9,0.95] --text 'a b'"
    commands = checkout.make("sft", args)
    assert stages_of(commands) == ["data.tinyworld", "stages.pretrain", "stages.sft"]
    assert [command.split(".yaml")[1] for command in commands[1:]] == [
        " --overwrite",
        " --overwrite --optim.betas [0.9,0.95] --text a b",
    ]
    assert checkout.make("sft", args) == []
    assert checkout.make("pretrain") == []
    assert checkout.make("sft") == ["stages.sft --config configs/sft/tiny.yaml --overwrite"]


def test_seed_has_a_folder_of_its_own(checkout: Checkout) -> None:
    commands = checkout.make("pretrain", "SEED=3")
    assert commands == [
        "data.tinyworld --output_dir runs/tiny-seed3/data --overwrite --seed 3",
        "stages.pretrain --config runs/tiny-seed3/settings/pretrain.yaml --overwrite --seed 3",
    ]
    settings = (checkout.folder / "runs/tiny-seed3/settings/pretrain.yaml").read_text()
    assert "runs/tiny-seed3/data/text.jsonl" in settings
    assert "runs/tiny/" not in settings


def test_preset_without_a_file_brings_its_own_inputs(checkout: Checkout) -> None:
    for stage in ("sft", "rm"):
        (checkout.folder / f"configs/{stage}/mine.yaml").write_text(
            f"output_dir: runs/mine/{stage}\n"
        )
    assert stages_of(checkout.make("rm", "PRESET=mine")) == ["stages.sft", "stages.rm"]


def test_args_without_a_stage_are_refused(checkout: Checkout) -> None:
    with pytest.raises(AssertionError, match="ARGS are for a stage"):
        checkout.make("pipeline", "ARGS=--seed 1")


def test_adapters_share_the_data_of_the_preset_with_all_weights(checkout: Checkout) -> None:
    (checkout.folder / ".venv" / ".installed-smollm2").touch()
    commands = checkout.make("pipeline", "PRESET=smollm2_lora")
    assert stages_of(commands) == [
        "data.smollm2",
        "stages.sft",
        "stages.rm",
        "stages.ppo",
        "stages.evaluate",
    ]
    assert commands[0] == "data.smollm2 --output_dir runs/smollm2/data --base_dir runs/smollm2/base"
    assert checkout.make("pipeline", "PRESET=smollm2_lora") == []
