"""Tests how a program ends."""

import pytest
from safetensors import SafetensorError

from rlhf.runs.interrupts import Interrupted
from rlhf.runs.program import INTERRUPTED, USER_ERROR, run_stage
from tests.rlhf.runs.test_checkpoints import Settings


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ValueError("seed is -1"), USER_ERROR, "error: seed is -1"),
        (SafetensorError("No space left"), USER_ERROR, "error: No space left"),
        (KeyboardInterrupt(), INTERRUPTED, "interrupted"),
        (Interrupted("ppo: interrupted after update 3"), INTERRUPTED, "ppo: interrupted after u"),
    ],
)
def test_what_a_user_can_mend_ends_in_one_line(
    error: BaseException, code: int, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def stage(config: Settings) -> None:
        raise error

    with pytest.raises(SystemExit) as ended:
        run_stage(stage, Settings, ["--output_dir", "unused"])
    assert ended.value.code == code
    assert capsys.readouterr().err.startswith(line)
