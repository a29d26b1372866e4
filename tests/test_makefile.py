"""make starts the right stages, in order and with the right arguments.

The stage itself decides whether its results are up to date. Here a script replaces python and the
launcher; it records its command and writes results.json.
"""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

FAKE = """#!/bin/sh
if [ "$2" = stages.stage_server ]; then shift 2; exec "$@"; fi
for word in "$@"; do
    case $before in
        --config) output=${output:-$(sed -n 's/^output_dir: //p' "$word")} ;;
        --run_dir) run=$word ;;
        --output_dir) output=$word ;;
    esac
    before=$word
done
case $output in \\$*) output=$run${output#?\\{run_dir\\}} ;; esac
echo "$OMP_NUM_THREADS|$(basename "$0")|$@" >> commands
mkdir -p "$output"
echo "{}" > "$output/results.json"
"""
CHAIN = ["data.tinyworld", "pretrain", "sft", "collect", "rm", "ppo", "ppo", "evaluate"]


class Checkout:
    """Holds a copy of what make reads, with the fake programs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        shutil.copy(ROOT / "Makefile", folder)
        for name in ("configs", ".ci"):
            shutil.copytree(ROOT / name, folder / name)
        (folder / ".venv").mkdir()
        for name in ("pyproject.toml", "constraints.txt", ".venv/.installed"):
            (folder / name).touch()
        for name in ("accelerate", "python"):
            (folder / name).write_text(FAKE)
            (folder / name).chmod(0o755)
        self.printed: list[str] = []
        self.threads: list[str] = []
        self.programs: list[str] = []

    def make(self, *words: str) -> list[str]:
        """Return what make ran, without the part that starts it."""
        log = self.folder / "commands"
        log.write_text("")
        command = ["make", "--silent", f"BIN={self.folder}", *words]
        environment = {"PATH": os.environ["PATH"], "HOME": str(self.folder / "home")}
        run = subprocess.run(
            command, cwd=self.folder, env=environment, capture_output=True, text=True
        )
        assert run.returncode == 0, run.stderr
        self.printed = run.stdout.splitlines()
        lines = [line.split("|", 2) for line in log.read_text().splitlines()]
        self.threads, self.programs = ([line[i] for line in lines] for i in (0, 1))
        return [line[2].split("-m ", 1)[1].removeprefix("stages.") for line in lines]


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    return Checkout(tmp_path)


def stages_of(commands: list[str]) -> list[str]:
    return [command.split()[0] for command in commands]


def test_pipeline_says_what_comes_and_asks_every_stage_in_order(checkout: Checkout) -> None:
    for _ in range(2):  # a stage with results may be out of date
        commands = checkout.make("pipeline")
        assert stages_of(commands) == CHAIN
    assert checkout.printed[0].startswith("The tiny world, seed 0: data, a base model")
    assert "Two to six minutes on two cores" in checkout.printed[1]
    assert re.fullmatch(r"done in \d+ s; report: runs/tiny/report.html, .*", checkout.printed[-1])
    assert commands[:2] == [
        "data.tinyworld --output_dir runs/tiny/data --overwrite",
        "pretrain --config configs/pretrain/tiny.yaml --run_dir runs/tiny --overwrite",
    ]


def test_the_two_ppo_runs_go_side_by_side_and_share_the_cores(checkout: Checkout) -> None:
    commands = checkout.make("pipeline", "cores=8")
    assert sorted(commands[5:7]) == [  # either may start first
        "ppo --config configs/ppo/tiny.yaml --run_dir runs/tiny --overwrite",
        "ppo --config configs/ppo/tiny.yaml --run_dir runs/tiny --ptx.coef 0"
        " --output_dir runs/tiny/ppo --overwrite",
    ]
    assert checkout.threads == [*[""] * 5, "4", "4", ""]
    checkout.make("ppo", "cores=8")
    assert checkout.threads == [""]


def test_quick_look_is_the_same_chain_with_settings_of_its_own(checkout: Checkout) -> None:
    commands = checkout.make("quick-look")
    assert stages_of(commands) == CHAIN
    assert all("runs/tiny" not in command and "tiny.yaml" not in command for command in commands)


def test_a_stage_asks_only_for_what_it_needs_and_is_not_there(checkout: Checkout) -> None:
    assert stages_of(checkout.make("rm")) == CHAIN[:5]
    assert stages_of(checkout.make("rm")) == ["rm"]
    assert stages_of(checkout.make("ppo-ptx")) == ["ppo"]
    (checkout.folder / "runs/tiny/rankings/results.json").unlink()
    assert stages_of(checkout.make("rm")) == ["collect", "rm"]
    assert stages_of(checkout.make("evaluate")) == ["ppo", "evaluate"]


def test_args_reach_the_named_stage_alone(checkout: Checkout) -> None:
    commands = checkout.make("sft", "ARGS=--optim.betas [0.9,0.95] --text 'a b'")
    assert stages_of(commands) == CHAIN[:3]
    assert [command.split("--overwrite")[1] for command in commands] == [
        "",
        "",
        " --optim.betas [0.9,0.95] --text a b",
    ]


def test_seed_has_a_folder_of_its_own(checkout: Checkout) -> None:
    assert checkout.make("pretrain", "SEED=3") == [
        "data.tinyworld --output_dir runs/tiny-seed3/data --overwrite --seed 3",
        "pretrain --config configs/pretrain/tiny.yaml --run_dir runs/tiny-seed3 --overwrite"
        " --seed 3",
    ]


def test_a_run_may_lie_below_the_home_folder(checkout: Checkout) -> None:
    home = checkout.folder / "home"
    commands = checkout.make("pretrain", "RUN=~/mine")
    assert commands[0] == f"data.tinyworld --output_dir {home}/mine/data --overwrite"
    assert f"--run_dir {home}/mine " in commands[1]
    assert (home / "mine" / "base" / "results.json").is_file()
    assert list(checkout.folder.glob("~*")) == []


def test_other_launchers_start_the_stages(checkout: Checkout) -> None:
    checkout.make("pipeline", "ACCELERATE=configs/accelerate/cpu2.yaml")
    assert checkout.programs == ["python", *["accelerate"] * 7]
    assert checkout.threads == [""] * 8, "one after the other: two launches would share a port"


def test_preset_without_a_file_brings_its_own_inputs(checkout: Checkout) -> None:
    for stage in ("sft", "rm"):
        (checkout.folder / f"configs/{stage}/mine.yaml").write_text(
            f"output_dir: ${{run_dir}}/{stage}\n"
        )
    assert stages_of(checkout.make("rm", "PRESET=mine")) == ["sft", "rm"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["pipeline", "ARGS=--seed 1"], "ARGS are for one stage"),
        (["sft", "ACCELERATE=none.yaml"], "none.yaml, which does not exist; one of .*cpu2.yaml"),
    ],
)
def test_what_cannot_be_meant_is_refused(
    words: list[str], message: str, checkout: Checkout
) -> None:
    with pytest.raises(AssertionError, match=message):
        checkout.make(*words)
    assert (checkout.folder / "commands").read_text() == ""


def test_adapters_share_the_data_of_the_preset_with_all_weights(checkout: Checkout) -> None:
    (checkout.folder / ".venv" / ".installed-smollm2").touch()
    commands = checkout.make("pipeline", "PRESET=smollm2_lora")
    assert stages_of(commands) == ["data.smollm2", "sft", "rm", "ppo", "evaluate"]
    assert commands[0].startswith(
        "data.smollm2 --output_dir runs/smollm2/data --base_dir runs/smollm2/base"
    )


def test_the_judge_of_a_preset_is_a_second_reward_model(checkout: Checkout) -> None:
    (checkout.folder / ".venv" / ".installed-smollm2").touch()
    commands = checkout.make("pipeline", "PRESET=harmless")
    data = ["data.smollm2", "data.instructions", "data.harmless"]
    assert stages_of(commands) == [*data, "sft", "rm", "ppo", "ppo", "rm", "evaluate"]
    assert "--config configs/rm/harmless_judge.yaml --run_dir runs/harmless " in commands[-2]


@pytest.mark.parametrize(
    ("preset", "aligned"),
    [("llama_1b", "ppo_ptx"), ("llama_8b", "ppo_ptx"), ("pythia_1b_tldr", "ppo")],
)
def test_a_preset_for_a_real_size_trains_one_policy(
    preset: str, aligned: str, checkout: Checkout
) -> None:
    commands = checkout.make("pipeline", f"PRESET={preset}")
    assert stages_of(commands) == ["sft", "rm", "ppo", "evaluate"]
    assert (checkout.folder / "runs" / preset / aligned / "results.json").is_file()


def test_a_command_is_printed_once(checkout: Checkout) -> None:
    """In a pipeline the client prints it (stages/stage_client.py), so make does not."""
    for variables, is_printed in (({}, True), ({"RLHF_STAGE_SERVER": "socket"}, False)):
        run = subprocess.run(
            ["make", f"BIN={checkout.folder}", "data"],
            cwd=checkout.folder,
            env={"PATH": os.environ["PATH"], **variables},
            capture_output=True,
            text=True,
        )
        assert run.returncode == 0, run.stderr
        assert ("data.tinyworld" in run.stdout) == is_printed


def test_a_stage_that_fails_ends_the_pipeline(checkout: Checkout) -> None:
    program = checkout.folder / "python"
    program.write_text(
        FAKE.replace("before=$word\n", 'before=$word; [ "$word" != stages.rm ] || exit 3\n')
    )
    run = subprocess.run(
        ["make", f"BIN={checkout.folder}", "pipeline"],
        cwd=checkout.folder,
        env={"PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
    )
    assert run.returncode != 0
    assert "done in" not in run.stdout
