"""What each process does when a launcher file for two nodes starts it.

    accelerate launch --config_file configs/accelerate/two_nodes_ddp.yaml --machine_rank 0 \\
        --main_process_ip 127.0.0.1 --num_processes 2 tests/distributed/node.py NAME INPUTS RESULTS

NAME is the launcher file's. INPUTS is a folder that `make_inputs` of tests/distributed/chain.py
wrote. Both nodes are on this machine.
"""

import gc
import json
import os
import sys
import tempfile
from pathlib import Path

import pytest
from accelerate import PartialState
from accelerate.utils import gather_object
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parents[2]))

from rlhf.runs import shared_files
from rlhf.training.processes import start_accelerator
from stages.sft.config import Config
from stages.sft.train import train as fine_tune
from tests.distributed.chain import sft_settings
from tests.distributed.gpu_files import all_parts, run_watched, split_weights, told_of_gpus

TOLD = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR")
"""What torch's launcher tells its processes."""


def main() -> None:
    name, inputs, results = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    gc.freeze()
    split_weights(0)
    with told_of_gpus():
        gradients, seen = run_watched(inputs, results / name, all_parts(name))
        seen["told"] = gather_object([{name: os.environ.get(name) for name in TOLD}])
        seen["refused"] = refused_on_disks_of_their_own(inputs)
    if PartialState().is_main_process:
        save_file(gradients, results / f"{name}.safetensors")
        (results / "seen.json").write_text(json.dumps({"files": {name: seen}}))


def refused_on_disks_of_their_own(inputs: Path) -> dict[str, list[str]]:
    """What SFT says in each process if each node has an output folder of its own, and if the first
    one alone has the demonstrations."""
    start_accelerator()
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as own:
        patch.chdir(own)  # relative paths are then this node's own
        patch.setattr(shared_files, "SEEN_WITHIN", 0.1)
        rows = Path("demonstrations.jsonl")
        if PartialState().is_main_process:
            rows.write_bytes((inputs / rows).read_bytes())
        return {
            "output": refused(sft_settings(inputs, Path("sft")), ValueError),
            "input": refused(
                sft_settings(inputs, Path("sft"), demonstrations=str(rows)),
                FileNotFoundError,
            ),
        }


def refused(settings: Config, kind: type[Exception]) -> list[str]:
    with pytest.raises(kind) as error:
        fine_tune(settings)
    return gather_object([str(error.value)])


if __name__ == "__main__":
    main()
