"""Find the episode or the text that makes a gradient NaN or infinite."""

from collections.abc import Sequence

import torch

from rlhf.inputs.packing import PromptTree
from rlhf.training import sharding
from rlhf.training.nonfinite import NonFiniteError, first_nonfinite, found_by_any
from stages.ppo.learner import Learner


def find_nonfinite(
    learner: Learner, episodes: Sequence[PromptTree], text: Sequence[PromptTree]
) -> NonFiniteError:
    """Find what made a gradient NaN or infinite, on all processes.

    Repeats the step's passes row by row, without gradients.
    """
    state = learner.state
    with sharding.whole_weights(state.accelerator, state.model):
        own = _find_own(learner, episodes, text)
    return found_by_any(own) or NonFiniteError("gradient", "train", step=state.schedule.last_epoch)


def _find_own(
    learner: Learner, episodes: Sequence[PromptTree], text: Sequence[PromptTree]
) -> NonFiniteError | None:
    step = learner.state.schedule.last_epoch
    for trees, phase in ((episodes, "train"), (text, "ptx")):
        for row in learner.packer.rows(trees):
            on_device = row.to(learner.state.accelerator.device)
            with torch.no_grad():
                logprobs, values = learner.models(on_device, with_values=phase == "train")
            assert logprobs is not None
            tensors = {"logprobs": row.unpack(logprobs.cpu())}
            if values is not None:
                tensors |= {"values": row.unpack(values.cpu())}
            of_row = [trees[i] for i in row.tree_index.tolist()]
            found = first_nonfinite(tensors, of_row, phase, step)
            if found is not None:
                return found
    return None
