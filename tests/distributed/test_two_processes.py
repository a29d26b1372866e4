"""Two processes take the gradient of the global batch that one takes."""

import subprocess
import sys
from pathlib import Path

from safetensors.torch import load_file

from tests.distributed.gradients import all_gradients

ROOT = Path(__file__).parents[2]


def test_gradients_of_a_global_batch_on_one_and_on_two_processes(tmp_path: Path) -> None:
    path = tmp_path / "gradients.safetensors"
    launch = [sys.executable, "-m", "accelerate.commands.launch"]
    settings = ["--config_file", str(ROOT / "configs/accelerate/cpu2.yaml")]
    program = [str(ROOT / "tests/distributed/gradients.py"), str(path)]
    done = subprocess.run(
        [*launch, *settings, *program], capture_output=True, text=True, timeout=120, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    of_two = load_file(path)
    assert of_two.pop("processes").item() == 2
    of_one = all_gradients(tmp_path)
    assert of_one.keys() == of_two.keys()
    for loss in ("ppo", "ratio", "rm"):
        assert max(g.abs().max() for name, g in of_one.items() if name.startswith(loss)) > 0.01
    differences = {name: (of_one[name] - of_two[name]).abs().max() for name in of_one}
    assert max(differences.values()) < 1e-5, max(differences, key=differences.__getitem__)
