"""Writes and restores our checkpoints under a transformers Trainer."""

from collections.abc import Callable, Mapping
from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from rlhf.runs.checkpoints import Checkpoints
from rlhf.runs.stateful import Generators, State, Stateful, trained_parts


class ResumeCallback(TrainerCallback):
    """Writes and restores checkpoints under a transformers Trainer.

    The Trainer must get only the batches after `checkpoints.step`. A step is saved when the next
    one begins. By then everything that follows it is logged, including its epoch's metrics, and the
    next step has drawn random numbers only for loading its batch. The Trainer's own checkpoints are
    not used because they are pickles.

    Args:
        parts: The run's state besides the model, its optimizer and its schedule.
        after_save: Called after each checkpoint.
    """

    def __init__(
        self,
        checkpoints: Checkpoints,
        trainer: Trainer,
        parts: Mapping[str, Stateful],
        after_save: Callable[[], None] = lambda: None,
    ) -> None:
        self._checkpoints = checkpoints
        self._trainer = trainer
        self._parts = parts
        self._after_save = after_save
        self._generators = Generators()
        self._before_first_step: State | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        trainer = self._trainer
        assert trainer.model is not None
        assert trainer.optimizer is not None and trainer.lr_scheduler is not None
        trained = trained_parts(
            trainer.accelerator, trainer.model, trainer.optimizer, trainer.lr_scheduler, {}
        )
        self._checkpoints.restore(
            {**trained.shared, **self._parts}, {**trained.own, "generators": self._generators}
        )
        step = self._checkpoints.step
        if step is not None:
            state.global_step = step
            trainer._globalstep_last_logged = step  # the Trainer averages the loss from here on
            self._before_first_step = self._generators.state_dict()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if self._before_first_step is not None:  # the Trainer drew numbers when it began the epoch
            self._generators.load_state_dict(self._before_first_step)
            self._before_first_step = None
        elif state.global_step > 0 and self._checkpoints.end_step(state.global_step):
            self._after_save()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self._checkpoints.close()
