"""Going on where a run was cut off, to the same bits: when checkpoints are written, and whether one
that is found is of this run."""

from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import DistributedType, broadcast_object_list, gather_object
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from rlhf.runs.checkpoint_files import (
    Manifest,
    check_files,
    checkpoint_folder,
    newest_checkpoint,
    read_manifest,
    read_states,
    remove_others,
    write_checkpoint,
)
from rlhf.runs.folder import MAX_SHOWN, contents_of, differing
from rlhf.runs.interrupts import Interrupted, interrupts
from rlhf.runs.run import Run
from rlhf.runs.stateful import Generators, OptimizerState, State, Stateful, Together, Weights
from rlhf.training.processes import max_over_processes

_PROCESSES = "processes"
_PRECISION = "mixed_precision"
"""The part that holds what each process has its own of, by its number."""
_SHARDED = (DistributedType.DEEPSPEED, DistributedType.FSDP, DistributedType.MEGATRON_LM)


class Checkpoints:
    """The checkpoints of one run; only the last one is kept.

        checkpoints = Checkpoints(run, accelerator, every)
        checkpoints.restore(parts, own)
        for step in ...:  # those behind checkpoints.step
            ...
            checkpoints.end_step(step)
        checkpoints.close()

    Made before anything of the run is written. The folder must be one that all processes see.

    Args:
        every: steps between checkpoints; None writes none.
        unit: what a step is called.

    Raises:
        ValueError: the folder holds a checkpoint of another run, or one that is not whole.
    """

    def __init__(
        self, run: Run, accelerator: Accelerator, every: int | None, *, unit: str = "step"
    ) -> None:
        self._run = run
        self._accelerator = accelerator
        self._every = every
        self._unit = unit
        self._num_since = 0
        self._parts, self._own = Together(), Together()
        if every is not None and accelerator.distributed_type in _SHARDED:
            self._every = None
            self._print(
                f"no checkpoints are written: {accelerator.distributed_type.value} cuts the "
                "optimizer up between processes, and a run under it cannot be resumed"
            )
        self.step: int | None = None
        """The step that the run goes on behind; None: it begins."""
        self._states: dict[str, State] = {}
        if accelerator.is_main_process:
            self.step, self._states = self._find()
        if accelerator.num_processes > 1:
            (self.step,) = broadcast_object_list([self.step])
            if self.step is not None and not accelerator.is_main_process:
                self._states = read_states(checkpoint_folder(run.checkpoints, self.step))

    @property
    def are_written(self) -> bool:
        """Whether this run writes any."""
        return self._every is not None

    def saved(self, part: str) -> State | None:
        """The state of a part in the checkpoint that was found; None if there is none."""
        return self._states.get(part)

    def restore(self, parts: Mapping[str, Stateful], own: Mapping[str, Stateful]) -> None:
        """Give the parts the states of the checkpoint that was found, if one was, and keep them for
        the next one. From here until `close`, an interrupt waits for the end of a step.

        Args:
            parts: what all processes have the same of.
            own: what each process has its own of, such as its generators.
        """
        self._parts, self._own = Together(parts), Together(own)
        states, self._states = self._states, {}
        if self.step is not None:
            of_process = states.pop(_PROCESSES)[str(self._accelerator.process_index)]
            self._parts.load_state_dict(states)
            self._own.load_state_dict(of_process)
        interrupts.are_deferred = self.are_written

    def end_step(self, step: int) -> bool:
        """Note that a step was done and logged; save if it is time, or if the run is to end.

        Returns:
            whether it was saved.

        Raises:
            Interrupted: a signal asked for the end.
            OSError: the checkpoint could not be written; the one before it is still there.
        """
        if self._every is None:
            return False
        self._num_since += 1
        is_to_end = bool(max_over_processes(self._accelerator, int(interrupts.is_pending)))
        is_time = is_to_end or self._num_since >= self._every
        if is_time:
            self._save(step)
        if is_to_end:
            raise Interrupted(
                f"{self._run.stage}: interrupted after {self._unit} {step}; the same command goes "
                f"on from {checkpoint_folder(self._run.checkpoints, step)}"
            )
        return is_time

    def close(self) -> None:
        """The last step is done: an interrupt, also one that waited, ends the program at once.

        The parts are let go, since a model among them would stay in memory.
        """
        self._parts, self._own = Together(), Together()
        interrupts.are_deferred = False
        if interrupts.is_pending:
            raise KeyboardInterrupt

    def _find(self) -> tuple[int | None, dict[str, State]]:
        """The step and the states to go on from, on the first process; None if there are none."""
        folder = newest_checkpoint(self._run.checkpoints)
        if folder is None or self._run.is_finished:
            return None, {}
        manifest = read_manifest(folder)
        if other := self._other_run(manifest):
            if self._run.may_overwrite:
                self._print(f"does not go on from {folder}, which is of another run: {other}")
                return None, {}
            raise ValueError(
                f"{folder} is of another run: {other}; start it as before to go on, or delete "
                f"{folder.parent} (or give --overwrite, or another output_dir) to start anew"
            )
        self._tell_other_code(folder, manifest)
        check_files(folder, manifest)
        states = read_states(folder)
        self._run.resume(manifest.step, manifest.seconds)
        self._print(f"resumes after {self._unit} {manifest.step} from {folder}")
        return manifest.step, states

    def _other_run(self, manifest: Manifest) -> str:
        """What differs between a checkpoint's run and this one, in words; empty if nothing does."""
        now, then = self._identity(), manifest.run
        differences = list(islice(_differences(then, now), MAX_SHOWN))
        if differences:
            return "; ".join(differences)
        count, kind = self._accelerator.num_processes, self._accelerator.distributed_type
        if manifest.num_processes != count or kind in _SHARDED:
            return (
                f"the number of processes was {manifest.num_processes} and is {count} "
                f"({kind.value}); others would draw other numbers and add in another order, and "
                "sharded ones hold no whole models"
            )
        return ""

    def _tell_other_code(self, folder: Path, manifest: Manifest) -> None:
        now, then = self._identity(), manifest.run
        for name in ("commit", "versions"):
            if then[name] != now[name]:
                self._print(
                    f"note: {folder} was written with {name} {then[name]}, and this is "
                    f"{now[name]}; the rest of the run may differ from what it would have been"
                )

    def _identity(self) -> dict[str, Any]:
        return {**self._run.identity(), _PRECISION: self._accelerator.mixed_precision}

    def _save(self, step: int) -> None:
        self._run.sync()  # a checkpoint is not of a step whose row could still be lost
        own = gather_object([self._own.state_dict()])
        if self._accelerator.is_main_process:
            states = self._parts.state_dict()
            states[_PROCESSES] = {str(rank): state for rank, state in enumerate(own)}
            folder = checkpoint_folder(self._run.checkpoints, step)
            try:
                write_checkpoint(
                    folder,
                    states,
                    step=step,
                    seconds=self._run.seconds,
                    num_processes=self._accelerator.num_processes,
                    run=self._identity(),
                )
            except OSError as error:
                raise OSError(f"{error}; {self._fallback()}") from error
            remove_others(folder)
        self._accelerator.wait_for_everyone()
        self._num_since = 0

    def _fallback(self) -> str:
        folder = newest_checkpoint(self._run.checkpoints)
        where = "from the start" if folder is None else f"from {folder}"
        return f"mend that and give the same command again, which goes on {where}"

    def _print(self, text: str) -> None:
        self._accelerator.print(f"{self._run.stage}: {text}", flush=True)


class ResumeCallback(TrainerCallback):
    """The same for a transformers Trainer, which gets only the batches behind `checkpoints.step`.

    A step is saved when the next one begins: by then all that follows it is logged, the figures of
    its epoch too, and nothing of the next has drawn a random number but the loading of its batch.
    Trainer's own checkpoints are pickles.

    Args:
        parts: what the run carries beside the model, its optimizer and its schedule.
        after_save: called when a checkpoint was written.
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
        parts: dict[str, Stateful] = {
            "model": Weights(trainer.model),
            "optimizer": OptimizerState(trainer.optimizer, trainer.model),
            "schedule": trainer.lr_scheduler,
            **self._parts,
        }
        self._checkpoints.restore(parts, {"generators": self._generators})
        step = self._checkpoints.step
        if step is not None:
            state.global_step = step
            trainer._globalstep_last_logged = step  # what it takes the mean loss since
            self._before_first_step = self._generators.state_dict()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if self._before_first_step is not None:  # the Trainer has drawn numbers to begin an epoch
            self._generators.load_state_dict(self._before_first_step)
            self._before_first_step = None
        elif state.global_step > 0 and self._checkpoints.end_step(state.global_step):
            self._after_save()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self._checkpoints.close()


def _differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """What a checkpoint's run and this one have different, in words."""
    contents = [{**run, "inputs": contents_of(run["inputs"])} for run in (then, now)]
    yield from differing(*contents)
    if then.get(_PRECISION) != now[_PRECISION]:
        yield f"the launcher's {_PRECISION} was {then.get(_PRECISION)} and is {now[_PRECISION]}"
