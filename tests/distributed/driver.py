"""What the tests do by several processes at once: a process group is started once a launcher file.

    accelerate launch --config_file configs/accelerate/cpu2.yaml tests/distributed/driver.py \\
        INPUTS RESULTS

INPUTS is a folder that `make_inputs` of tests/distributed/chain.py wrote.
"""

import json
import sys
from pathlib import Path

from accelerate.utils import DeepSpeedPlugin
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parents[2]))

from rlhf import distributed
from rlhf.distributed import start_accelerator
from tests.distributed.chain import run_chain
from tests.distributed.gradients import all_steps


def main() -> None:
    inputs, results = Path(sys.argv[1]), Path(sys.argv[2])
    results.mkdir(exist_ok=True)
    split_every_weight()
    steps = all_steps(results)
    accelerator = start_accelerator()
    if accelerator.is_main_process:
        save_file(steps.gradients, results / "gradients.safetensors")
        seen = {"processes": accelerator.num_processes, "whole": steps.whole}
        (results / "seen.json").write_text(json.dumps(seen))
    run_chain(inputs, results)


def split_every_weight() -> None:
    """Has ZeRO-3 split also weights of fewer than 100,000 numbers, which it otherwise leaves whole
    on every process: all that the tiny models have."""
    make_plugin = distributed._deepspeed_plugin

    def make_splitting_plugin() -> DeepSpeedPlugin:
        plugin = make_plugin()
        plugin.deepspeed_config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        return plugin

    distributed._deepspeed_plugin = make_splitting_plugin


if __name__ == "__main__":
    main()
