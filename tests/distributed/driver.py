"""What the tests do by several processes at once: a process group is started once a launcher file.

    accelerate launch --config_file configs/accelerate/cpu2.yaml tests/distributed/driver.py \\
        INPUTS RESULTS

INPUTS is a folder that `make_inputs` of tests/distributed/chain.py wrote.
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parents[2]))

from rlhf.distributed import start_accelerator
from tests.distributed.chain import run_chain
from tests.distributed.gradients import all_gradients


def main() -> None:
    inputs, results = Path(sys.argv[1]), Path(sys.argv[2])
    results.mkdir(exist_ok=True)
    found = all_gradients(results)
    accelerator = start_accelerator()
    if accelerator.is_main_process:
        processes = torch.tensor(accelerator.num_processes)
        save_file({**found, "processes": processes}, results / "gradients.safetensors")
    run_chain(inputs, results)


if __name__ == "__main__":
    main()
