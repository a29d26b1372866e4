"""The plan of fine-tuning's settings, from numbers worked by hand."""

from pathlib import Path

from tests.tools.plan.inputs import PROMPT_TOKENS, VOCAB, fine_tuning_config
from tools.plan.launch import Launch
from tools.plan.make import make_plan


def test_a_gpu_also_holds_the_columns_of_logits_that_a_small_vocabulary_leaves_empty(
    tiny: Path, tmp_path: Path
) -> None:
    """TRL's head has a buffer of 32,768 columns, a row for each token that has a next one."""
    config = fine_tuning_config(tiny, tmp_path / "run", response_tokens=8)
    length = PROMPT_TOKENS + 8
    name = f"pass of 2 x {length} tokens, forward and backward"
    on_cpu, on_gpu = (
        make_plan(config, Launch(device=device)).parts[name] for device in ("cpu", "cuda")
    )
    assert on_gpu - on_cpu == 2 * (length - 1) * (32768 - VOCAB) * 4


def test_zero3_holds_gradients_once(tiny: Path, tmp_path: Path) -> None:
    """It exchanges them in each pass, so that no process keeps whole ones between passes."""
    config = fine_tuning_config(tiny, tmp_path / "run", response_tokens=8)
    plan = make_plan(config, Launch(2, zero_stage=3))
    a_pass = plan.parts[f"pass of 2 x {PROMPT_TOKENS + 8} tokens, forward and backward"]
    assert plan.phases["train"] == sum(plan.held.values()) + a_pass
