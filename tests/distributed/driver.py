"""What the tests do by several processes at once: a process group is started once a launcher file.

    accelerate launch --config_file configs/accelerate/cpu2.yaml tests/distributed/driver.py \\
        INPUTS RESULTS PARTS FILES

INPUTS is a folder that `make_inputs` of tests/distributed/chain.py wrote. PARTS is a JSON list of
what the tests ask for beside a step of each loss and the three stages. FILES are launcher files for
GPUs, which are tried too: a JSON object from the name of a file to the parts that the tests ask for
(see tests/distributed/gpu_files.py).
"""

import gc
import json
import sys
from pathlib import Path

from accelerate import PartialState
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parents[2]))

from rlhf.training import sharding
from rlhf.training.processes import start_accelerator
from tests.distributed.chain import LORA, run_chain
from tests.distributed.gpu_files import Part, run_under, split_weights
from tests.distributed.gradients import all_steps
from tests.distributed.other_stages import run_others
from tests.distributed.rollouts import greedy_rollouts, watched_rollouts
from tests.distributed.row_counts import FEW, MORE, run_all
from tests.distributed.stops import stopped_by_nan, stopped_by_nan_in_sampling
from tests.distributed.streamed import streamed_rollouts


def main() -> None:
    inputs, results = Path(sys.argv[1]), Path(sys.argv[2])
    parts: list[Part] = json.loads(sys.argv[3])
    files: dict[str, list[Part]] = json.loads(sys.argv[4])
    results.mkdir(exist_ok=True)
    gc.freeze()  # each Trainer collects garbage at its end: 0.3 s for all that was imported
    split_weights(0)
    steps = all_steps(results / "steps")
    seen = {"whole": steps.whole, "greedy": greedy_rollouts(1, 12)}
    with watched_rollouts() as seen["rollouts"]:
        run_chain(inputs, results)
    if "adapters" in parts:
        run_chain(inputs, results / "adapters", lora=LORA)
    if "stops" in parts:
        seen["stopped"] = stopped_by_nan(inputs, results)
        seen["stopped_sampling"] = stopped_by_nan_in_sampling(inputs, results)
    if "others" in parts:
        run_others(inputs, results)
    accelerator = start_accelerator()
    is_split = sharding.shards_weights(accelerator)
    if "rows" in parts:
        run_all(inputs, results, FEW)
    if "more rows" in parts:
        run_all(inputs, results, MORE)
    if is_split:
        seen["streamed"] = streamed_rollouts()
    seen["processes"] = accelerator.num_processes
    of_files = {
        name: run_under(name, inputs, results / name, asked) for name, asked in files.items()
    }
    seen["files"] = {name: found for name, (_, found) in of_files.items()}
    if PartialState().is_main_process:
        save_file(steps.gradients, results / "gradients.safetensors")
        for name, (gradients, _) in of_files.items():
            save_file(gradients, results / f"{name}.safetensors")
        (results / "seen.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    main()
