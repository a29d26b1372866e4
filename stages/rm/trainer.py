"""Train with transformers' Trainer and the ranking loss over packed prompt trees.

An optimizer step takes `batch_size` rankings. Their trees are packed into rows of at most
`micro_batch_tokens`. Every row has its own forward and backward pass, so memory depends on this
budget and not on the batch. The loss is normalised by the whole batch, over all processes.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from rlhf.inputs.packing import PackedRow, Packer, PromptTree
from rlhf.inputs.records import Ranking
from rlhf.inputs.streams import torch_stream
from rlhf.maths.losses import Stats, preferences_from_ranks, ranking_loss
from rlhf.models.scalar import ScalarModel
from rlhf.runs.run import Run
from rlhf.training.optim import make_optimizer, make_schedule
from rlhf.training.processes import (
    TRAINER_STATE,
    check_launch,
    is_bf16,
    is_on_cpu,
    load_models_whole,
    max_over_processes,
    own_share,
    sum_over_processes,
    use_accelerator_at_work,
)
from stages.rm.config import Config
from stages.rm.data import Example

Batch = dict[str, Any]
"""Holds `rows`, the packed rows of one process; `comparisons` of their responses; and `weight`, the
total weight of their rankings."""

_IDLE = -1
"""Response number that marks an idle row, which only keeps a process in step with the others."""


class GlobalBatches:
    """Yields this process's share of each global batch as indices, in a new order every epoch.

    The first pass starts after `first_step` steps. Every ranking is seen exactly once an epoch. So
    the last batch of an epoch may be small, and a process may get no ranking of it.
    """

    def __init__(
        self, num_examples: int, config: Config, accelerator: Accelerator, first_step: int = 0
    ) -> None:
        self.num_examples = num_examples
        self.batch_size = config.batch_size
        self.accelerator = accelerator
        self.generator = torch_stream(config.seed, "rm/order")
        num_passes, self.num_skipped = divmod(first_step, len(self))
        for _ in range(num_passes):
            self._draw()

    def __len__(self) -> int:
        return math.ceil(self.num_examples / self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        order, first = self._draw(), self.num_skipped * self.batch_size
        self.num_skipped = 0
        for start in range(first, self.num_examples, self.batch_size):
            yield own_share(self.accelerator, order[start : start + self.batch_size])

    def _draw(self) -> list[int]:
        return torch.randperm(self.num_examples, generator=self.generator).tolist()


@dataclass(frozen=True)
class Comparisons:
    """Holds what `ranking_loss` needs to know of the responses in a batch or in one row."""

    preferences: Tensor
    """(responses, responses)"""
    tree_index: Tensor
    """(responses,)"""
    weights: Tensor
    """(responses,)"""
    margins: Tensor | None
    """(responses, responses)"""

    def of(self, row: PackedRow) -> "Comparisons":
        """Return the comparisons of a row's responses; an idle row has no preferences."""
        if _is_idle(row):
            return Comparisons(torch.zeros(1, 1), row.tree_index, torch.ones(1), None)
        chosen = row.response_index
        square = (chosen[:, None], chosen[None, :])
        margins = None if self.margins is None else self.margins[square]
        return Comparisons(
            self.preferences[square], self.tree_index[chosen], self.weights[chosen], margins
        )


class RankingCollator:
    """Packs the rankings of a step into rows."""

    def __init__(self, packer: Packer, margin_per_rank: float = 0.0) -> None:
        self.packer = packer
        self.margin_per_rank = margin_per_rank

    def __call__(self, examples: Sequence[Example]) -> Batch:
        return {
            "rows": self.packer.rows([example.tree for example in examples]),
            "comparisons": make_comparisons(
                [example.ranking for example in examples], self.margin_per_rank
            ),
            "weight": math.fsum(example.ranking.weight for example in examples),
        }


def make_comparisons(rankings: Sequence[Ranking], margin_per_rank: float) -> Comparisons:
    """Return the comparisons of these rankings, with their responses one after another."""
    trees = [tree for tree, ranking in enumerate(rankings) for _ in ranking.responses]
    tree_index = torch.tensor(trees, dtype=torch.long)
    weights = torch.tensor([rankings[tree].weight for tree in trees], dtype=torch.float32)
    ranks = torch.tensor([rank or 0 for one in rankings for rank in one.ranks], dtype=torch.long)
    preferences = preferences_from_ranks(ranks, tree_index)
    start = 0
    for ranking in rankings:
        for i, j, probability in ranking.probabilities:
            preferences[start + i, start + j] = probability
            preferences[start + j, start + i] = 1 - probability
        for i, j in ranking.equal_pairs():
            preferences[start + i, start + j] = preferences[start + j, start + i] = 0.0
        start += len(ranking.responses)
    margins = margin_per_rank * (ranks[None, :] - ranks[:, None]) if margin_per_rank else None
    return Comparisons(preferences, tree_index, weights, margins)


class AtEpochEnd(TrainerCallback):
    """Calls a function with the step number at the end of every epoch but the last."""

    def __init__(self, function: Callable[[int], None]) -> None:
        self.function = function

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if state.global_step < state.max_steps:
            self.function(state.global_step)


class RankingTrainer(Trainer):
    """Trains a ScalarModel on rankings; each ranking must have a pair."""

    def __init__(
        self,
        model: ScalarModel,
        examples: Sequence[Example],
        packer: Packer,
        config: Config,
        run: Run,
        first_step: int = 0,
    ) -> None:
        self.config = config
        self.run = run
        self.first_step = first_step
        self.examples = list(examples)
        self.first_loss = math.nan
        self._metrics: dict[str, float] = {}
        self._idle_row = _make_idle_row(examples[0].tree)
        super().__init__(
            model=model,
            args=_training_arguments(config, run),
            train_dataset=self.examples,
            data_collator=RankingCollator(packer, config.margin_per_rank),
        )
        check_launch(self.accelerator)
        load_models_whole()

    def get_train_dataloader(self) -> DataLoader:
        """Make our own loader, since accelerate's repeats rankings to give each process as many."""
        batches = GlobalBatches(len(self.examples), self.config, self.accelerator, self.first_step)
        collator = self.data_collator
        return DataLoader(self.examples, batch_sampler=batches, collate_fn=collator)  # type: ignore[arg-type]

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        assert self.model is not None
        settings = self.config.optim
        self.optimizer = make_optimizer([(self.model, settings.learning_rate)], settings)
        return self.optimizer

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        optimizer = optimizer or self.optimizer
        assert optimizer is not None
        self.lr_scheduler = make_schedule(optimizer, self.config.optim, num_training_steps)
        return self.lr_scheduler

    def training_step(
        self, model: nn.Module, inputs: Batch, num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Add the gradient of the whole batch, row by row; return the mean loss."""
        model.train()
        rows, comparisons = inputs["rows"], inputs["comparisons"]
        total_weight = sum_over_processes(self.accelerator, inputs["weight"]).item()
        is_split = max_over_processes(self.accelerator, int(_splits_a_tree(rows)))
        # Processes of a sharded model wait for each other in every pass, so all make as many.
        num_passes = max_over_processes(self.accelerator, len(rows))
        rows = [*rows, *[self._idle_row] * (num_passes - len(rows))]

        totals = torch.zeros(4, dtype=torch.float64)
        slopes = torch.zeros(len(comparisons.tree_index))
        if is_split:
            slopes, totals = self._score_slopes(model, rows, comparisons, total_weight)
        for number, row in enumerate(rows, start=1):
            with self._synced_at_last(model, is_last=number == num_passes):
                scores = self._scores(model, row)
                if is_split:
                    loss = (scores * _part_of(row, slopes).to(scores.device)).sum()
                else:
                    loss, stats = _ranking_loss(scores, comparisons.of(row), total_weight)
                    totals += _totals(loss, stats)
                self._backward(loss)
        return self._record(sum_over_processes(self.accelerator, totals))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Write a step's metrics into the run's folder, without Trainer's own summary."""
        if "learning_rate" not in logs:
            return
        metrics = {**self._metrics, "rm/learning_rate": logs["learning_rate"]}
        if logs.get("grad_norm") is not None:
            metrics["rm/grad_norm"] = logs["grad_norm"]
        self.run.log(self.state.global_step, metrics)

    def _score_slopes(
        self, model: nn.Module, rows: list[PackedRow], comparisons: Comparisons, total_weight: float
    ) -> tuple[Tensor, Tensor]:
        """Return d loss / d score (responses,) and totals, for rankings that lie in several rows.

        With these slopes every row can go backward alone, at the cost of one more forward pass
        (gradient caching, Gao et al. 2021). Rankings lie in several rows if the model cannot take
        the packing mask, or if they are longer than a sliding window.
        """
        scores = torch.zeros(len(comparisons.tree_index))
        with torch.no_grad():
            for row in rows:
                found = self._scores(model, row).float().cpu()
                if not _is_idle(row):
                    scores[row.response_index] = found
        scores.requires_grad_()
        loss, stats = _ranking_loss(scores, comparisons, total_weight)
        (slopes,) = torch.autograd.grad(loss, scores)
        return slopes, _totals(loss, stats)

    def _scores(self, model: nn.Module, row: PackedRow) -> Tensor:
        """Return scores (responses of the row,) that gradients can flow through."""
        row = row.to(self.args.device)
        with self.compute_loss_context_manager():
            return model(row.last_tokens, **row.model_inputs)

    def _backward(self, loss: Tensor) -> None:
        # Data parallelism averages gradients over processes, but the loss needs their sum.
        is_deepspeed = self.accelerator.distributed_type == DistributedType.DEEPSPEED
        options = {"scale_wrt_gas": False} if is_deepspeed else {}
        self.accelerator.backward(loss * self.accelerator.num_processes, **options)

    @contextlib.contextmanager
    def _synced_at_last(self, model: nn.Module, is_last: bool) -> Iterator[None]:
        """Let processes exchange gradients, and DeepSpeed take its step, in the last pass only."""
        self.accelerator.gradient_state._set_sync_gradients(is_last)
        is_deepspeed = self.accelerator.distributed_type == DistributedType.DEEPSPEED
        if is_last or is_deepspeed:
            yield
        else:
            with self.accelerator.no_sync(model):
                yield

    def _record(self, totals: Tensor) -> Tensor:
        """Keep a step's metrics for `log`; they are those of the weights before the step.

        Raises:
            ValueError: the loss is not finite.
        """
        loss, pairs, correct, margin = totals.tolist()
        if not math.isfinite(loss):
            raise ValueError(
                f"the loss is {loss} at step {self.state.global_step + 1}; lower "
                f"optim.learning_rate ({self.config.optim.learning_rate}), or hold the model in "
                "float32"
            )
        if self.state.global_step == 0:
            self.first_loss = loss
        self._metrics = {
            "rm/loss": loss,
            "rm/accuracy": correct / pairs if pairs else math.nan,
            "rm/margin": margin / pairs if pairs else math.nan,
            "rm/pairs": pairs,
        }
        return torch.tensor(loss, device=self.args.device)


def _training_arguments(config: Config, run: Run) -> TrainingArguments:
    arguments = TrainingArguments(
        output_dir=str(run.dir),
        num_train_epochs=config.num_epochs,
        max_grad_norm=config.optim.max_grad_norm,
        seed=config.seed,
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="no",
        eval_strategy="no",
        report_to="none",
        remove_unused_columns=False,
        bf16=is_bf16(),
        use_cpu=is_on_cpu(),
        accelerator_config=TRAINER_STATE,
        ddp_find_unused_parameters=False,
    )
    use_accelerator_at_work(arguments)
    return arguments


def _ranking_loss(
    scores: Tensor, comparisons: Comparisons, total_weight: float
) -> tuple[Tensor, Stats]:
    device = scores.device
    return ranking_loss(
        scores,
        comparisons.preferences.to(device),
        comparisons.tree_index.to(device),
        num_prompts=total_weight,
        weights=comparisons.weights.to(device),
        margins=None if comparisons.margins is None else comparisons.margins.to(device),
    )


def _totals(loss: Tensor, stats: Stats) -> Tensor:
    """Return (4,) in float64: part of the loss, pairs, pairs ordered right, sum of margins."""
    values = [loss.detach(), stats["pairs"], stats["correct"], stats["margin"]]
    return torch.stack([value.double().cpu() for value in values])


def _splits_a_tree(rows: Sequence[PackedRow]) -> bool:
    trees = [tree for row in rows for tree in set(row.tree_index.tolist())]
    return len(trees) > len(set(trees))


def _make_idle_row(tree: PromptTree) -> PackedRow:
    """Make a short row whose loss is 0, since its response has no rank."""
    (row,) = Packer(1).rows([PromptTree(tree.prompt[:1], (tree.responses[0][-1:],))])
    return replace(row, response_index=torch.full_like(row.response_index, _IDLE))


def _is_idle(row: PackedRow) -> bool:
    return row.response_index[0].item() == _IDLE


def _part_of(row: PackedRow, values: Tensor) -> Tensor:
    """Select a row's values from the values of the batch (responses,); zeros for an idle row."""
    if _is_idle(row):
        return values.new_zeros(len(row.response_index))
    return values[row.response_index]
