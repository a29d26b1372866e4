"""Take one optimizer step on a batch of rankings.

The trees of the rankings are packed into rows of at most `micro_batch_tokens`. Every row has its
own forward and backward pass, so memory depends on this budget and not on the batch. The loss is
normalised by the whole batch, over all processes.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from rlhf.inputs.packing import PackedRow, Packer
from rlhf.maths.losses import ranking_loss
from rlhf.models.scalar import ScalarModel
from rlhf.training.nonfinite import NonFiniteError
from rlhf.training.processes import max_over_processes, sum_over_processes, sums_over_processes
from rlhf.training.step import Step, TrainState, equal_rows
from stages.rm.batches import Comparisons, make_comparisons
from stages.rm.config import Config
from stages.rm.data import Example

State = TrainState[ScalarModel]


def update(
    state: State, examples: Sequence[Example], packer: Packer, config: Config
) -> dict[str, float]:
    """Take one step; return its metrics, which are those of the weights before it.

    Args:
        examples: This process's rankings of the batch, which may be none.

    Raises:
        NonFiniteError: The loss or its gradient is NaN or infinite. The step is not taken.
    """
    accelerator = state.accelerator
    state.model.train()
    step = Step(state)
    rows = packer.rows([example.tree for example in examples])
    rankings = [example.ranking for example in examples]
    comparisons = make_comparisons(rankings, config.margin_per_rank).to(accelerator.device)
    own_weight = math.fsum(ranking.weight for ranking in rankings)
    total_weight = sum_over_processes(accelerator, own_weight).item()
    gradients = None
    if max_over_processes(accelerator, int(_splits_a_tree(rows))):
        gradients, stats = score_gradients(state, rows, comparisons, total_weight)
        step.add_stats(stats)
    for row in step.rows(rows):
        scores = scores_of(state, row)
        if gradients is None:
            of_row = comparisons.of(row)
            loss, stats = ranking_loss(scores, **vars(of_row), num_prompts=total_weight)
            step.add_stats(_in_float64({"loss": loss, **stats}))
        else:
            loss = (scores * gradients[row.response_index]).sum()
        step.add(loss)
    metrics = _metrics(sums_over_processes(accelerator, step.sums))
    if not math.isfinite(metrics["rm/loss"]):
        raise NonFiniteError("loss", "train", step=state.schedule.last_epoch)
    (grad_norm,) = step.take()
    return {**metrics, "rm/learning_rate": step.learning_rate, "rm/grad_norm": grad_norm}


def scores_of(state: State, row: PackedRow) -> Tensor:
    """Return scores (responses of the row,) that gradients can flow through."""
    return state.model(row.last_tokens, **row.model_inputs)


def score_gradients(
    state: State, rows: Sequence[PackedRow], comparisons: Comparisons, total_weight: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return d loss / d score (responses,) and sums, for rankings that lie in several rows.

    With these gradients every row has its own backward pass, at the cost of one more forward pass
    (gradient caching, Gao et al. 2021). Rankings lie in several rows if the model cannot take the
    packing mask, or if they are longer than a sliding window.
    """
    device = state.accelerator.device
    scores = torch.zeros(len(comparisons.tree_index), device=device)
    with torch.no_grad():
        for row in equal_rows(state.accelerator, rows):
            on_device = row.to(device, non_blocking=True)
            scores[on_device.response_index] = scores_of(state, on_device).float()
    scores.requires_grad_()
    loss, stats = ranking_loss(scores, **vars(comparisons), num_prompts=total_weight)
    (gradients,) = torch.autograd.grad(loss, scores)
    return gradients, _in_float64({"loss": loss, **stats})


def _metrics(sums: Mapping[str, float]) -> dict[str, float]:
    pairs = sums["pairs"]
    return {
        "rm/loss": sums["loss"],
        "rm/accuracy": sums["correct"] / pairs if pairs else math.nan,
        "rm/margin": sums["margin"] / pairs if pairs else math.nan,
        "rm/pairs": pairs,
    }


def _in_float64(stats: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().double() for name, value in stats.items()}


def _splits_a_tree(rows: Sequence[PackedRow]) -> bool:
    trees = [tree for row in rows for tree in set(row.tree_index.tolist())]
    return len(trees) > len(set(trees))
