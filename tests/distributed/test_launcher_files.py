"""Tests what the launcher files and their page say; test_launchers.py starts most of them."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate.commands.launch import launch_command_parser

from tests.distributed.launching import OPTIONS_OF_A_NODE, ROOT, TWO_NODES, run_on_two_nodes
from tests.distributed.table import table

PAGE = ROOT / "docs" / "scaling.md"
LAUNCHERS = sorted((ROOT / "configs" / "accelerate").glob("*.yaml"))


@pytest.mark.parametrize("path", LAUNCHERS, ids=lambda path: path.stem)
def test_launcher_files_hold_what_accelerate_reads(path: Path) -> None:
    known = vars(launch_command_parser().parse_args(["--config_file", str(path), "program.py"]))
    settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    for section in ("deepspeed_config", "fsdp_config"):
        assert settings.get(section, {}).keys() <= known.keys()
    needs = {"DEEPSPEED": "deepspeed_config", "FSDP": "fsdp_config"}.get(
        settings["distributed_type"]
    )
    assert needs is None or settings[needs]


@pytest.mark.parametrize("name", TWO_NODES)
def test_files_for_two_nodes_have_the_settings_of_one_node(name: str) -> None:
    _, same = TWO_NODES[name]
    own, of_one_node = (settings_of(name), settings_of(same))
    assert own.pop("machine_rank") == 0 and own.pop("main_process_port") == 29500
    assert own.pop("rdzv_backend") == "static" and own.pop("same_network")
    assert own.pop("main_process_ip") == "10.0.0.1"
    assert (own.pop("num_machines"), of_one_node.pop("num_machines")) == (2, 1)
    assert (own.pop("num_processes"), of_one_node.pop("num_processes")) == (16, 8)
    if "deepspeed_config" in own:
        assert own["deepspeed_config"].pop("deepspeed_multinode_launcher") == "standard"
    assert own == of_one_node


@pytest.mark.slow
def test_two_nodes_find_each_other() -> None:
    """Under ZeRO too, which DeepSpeed's own launcher would start over ssh."""
    printed = run_on_two_nodes("two_nodes_zero3", "--no_python", "env")
    for rank, text in enumerate(printed):
        told = dict(line.split("=", 1) for line in text.splitlines() if "=" in line)
        assert (told["RANK"], told["LOCAL_RANK"], told["WORLD_SIZE"]) == (str(rank), "0", "2")
        assert told["MASTER_ADDR"] == "127.0.0.1"
        assert told["ACCELERATE_DEEPSPEED_ZERO_STAGE"] == "3"


def test_the_page_says_what_was_tested() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert table() in page, "python -m tests.distributed.table prints the table"


def test_the_page_says_how_to_start_two_nodes() -> None:
    page = " ".join(PAGE.read_text(encoding="utf-8").replace("\\\n", " ").split())
    file = "configs/accelerate/two_nodes_fsdp2.yaml"
    for rank in range(2):
        options = OPTIONS_OF_A_NODE.format(rank=rank, address="10.0.0.1", count=16)
        assert f"accelerate launch --config_file {file} {options} -m stages.ppo --config" in page


def settings_of(name: str) -> Any:
    path = ROOT / f"configs/accelerate/{name}.yaml"
    return yaml.safe_load(path.read_text(encoding="utf-8"))
