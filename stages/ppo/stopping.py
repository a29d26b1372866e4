"""Save the policy: at the end, along the run, and when a fault or an alarm ends it."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from rlhf.inputs.chat import Chat
from rlhf.models.saving import save_policy
from rlhf.runs.run import Run
from rlhf.training import sharding
from rlhf.training.nonfinite import NonFiniteError
from rlhf.training.processes import naming
from stages.ppo.learner import Learner
from stages.ppo.monitor import (
    LAST_GOOD,
    NONFINITE,
    POLICIES,
    REPLAY_FILE,
    Monitor,
    TrainingStopped,
    write_replay,
)


@contextmanager
def saving_when_stopped(learner: Learner, monitor: Monitor, chat: Chat, run: Run) -> Iterator[None]:
    """Save the weights when an alarm ends the run, and say in the message where they are.

    If another process does not answer, say where this one stood.
    """

    def place() -> str:
        return f"phase {learner.stopwatch.last_phase} of update {monitor.update}"

    try:
        try:
            with naming(learner.state.accelerator, place):
                yield
        except NonFiniteError as error:
            if learner.state.accelerator.is_main_process:
                write_replay(error, monitor.update, chat, run.dir)
            prompt = "" if error.tree is None else f" at prompt {chat.show(error.tree.prompt)!r}"
            found = f"{error}{prompt} (see {run.dir / REPLAY_FILE})."
            monitor.raise_alarm(NONFINITE, found)
    except TrainingStopped as stop:
        run.alarms(monitor.take_raised())
        run.refresh_page(is_last=True)
        folder = run.dir / LAST_GOOD
        save_trained_policy(learner, chat, folder)
        raise TrainingStopped(f"{stop} The weights before it are in {folder}.") from stop


def save_policy_copy(
    learner: Learner, chat: Chat, run: Run, number: int, every: int | None
) -> None:
    """Write the policy as a run that ends after this update would, if a copy is due.

    All processes must call this.

    Args:
        number: The update, counted from 0.
        every: Updates between copies. None means no copies.
    """
    if every is None or (number + 1) % every:
        return
    average = learner.state.average
    with nullcontext() if average is None else average.in_place():
        save_trained_policy(learner, chat, run.dir / POLICIES / f"update-{number}")


def save_trained_policy(learner: Learner, chat: Chat, folder: Path) -> None:
    """Write the policy as a plain model folder; all processes must call this."""
    accelerator = learner.state.accelerator
    weights = sharding.whole_state(accelerator, learner.state.model, "policy")
    if accelerator.is_main_process:
        save_policy(learner.models.policy, chat.tokenizer, folder, weights)
    accelerator.wait_for_everyone()
