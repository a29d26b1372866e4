"""Holds what the wing must know of DeepSpeed's insides to save a run and go on from it.

DeepSpeed writes its own checkpoints as pickles. Its ZeRO optimizers also give and take their state
as dictionaries, which are turned here into names, tensors and plain values. Tried with DeepSpeed
0.19.8, stages 2 and 3; a new version is tried here first.
"""

from typing import Any

import torch
from torch import Tensor

from rlhf.training.parameters import check_shapes

_KEYS = {
    2: ("single_partition_of_fp32_groups", "base_optimizer_state"),
    3: ("fp32_flat_groups", "optimizer_state_dict"),
}
"""Maps a stage to DeepSpeed's names for this process's fp32 weights, and for the state of the
optimizer that steps them. deepspeed.checkpoint.constants has the same names."""


def zero_state(optimizer: Any) -> dict[str, Any]:
    """Return what a ZeRO optimizer keeps in this process; nothing is copied.

    Returns:
        "weights": fp32 tensors (numbers of one flat group,) by the number of the group; "moments":
        the optimizer's state of each; "groups": the optimizer's parameter groups.
    """
    weights, state = _read(optimizer)
    moments = {str(number): of_one for number, of_one in state["state"].items()}
    return {"weights": weights, "moments": moments, "groups": state["param_groups"]}


def load_zero_state(optimizer: Any, state: dict[str, Any]) -> None:
    """Put back what `zero_state` returned, and derive from it the weights of the model's passes.

    All processes must call this.

    Raises:
        ValueError: The state is of another model, or of another split.
    """
    whole = optimizer.state_dict()
    of_weights, of_moments = _KEYS[int(whole["zero_stage"])]
    present, _ = _read(optimizer)
    check_shapes(state["weights"], present)
    whole[of_weights] = [state["weights"][name] for name in present]
    whole[of_moments] = {
        "state": {int(number): of_one for number, of_one in state["moments"].items()},
        "param_groups": state["groups"],
    }
    # DeepSpeed expects the states of all processes, and takes its own by number.
    own = {torch.distributed.get_rank(): whole}
    if int(whole["zero_stage"]) == 3:
        optimizer.checkpoint_event_prologue()
        optimizer.load_state_dict(own)
        optimizer.checkpoint_event_epilogue()
    else:
        optimizer.load_state_dict(own, load_from_fp32_weights=True)
        optimizer.update_lp_params()


def _read(optimizer: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the fp32 weights by number, and the inner optimizer's state in torch's form."""
    whole = optimizer.state_dict()
    of_weights, of_moments = _KEYS[int(whole["zero_stage"])]
    return {str(i): flat for i, flat in enumerate(whole[of_weights])}, whole[of_moments]
