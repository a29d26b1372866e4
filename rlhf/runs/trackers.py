"""Sends what a run writes to metrics.jsonl and samples.jsonl to TensorBoard, W&B and trackio.

Nothing is read back from trackers. They write to trackers/ in the run's folder. Without a login,
W&B runs offline; `wandb sync FOLDER` sends the data later. Trackio always stays on this disk;
`TRACKIO_DIR=FOLDER trackio show` shows it.
"""

import importlib.util
import netrc
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

from rlhf.runs.files import plain_values

if TYPE_CHECKING:
    from accelerate.tracking import GeneralTracker

TRACKERS = "trackers"
SAMPLES_TABLE = "samples"

Tracker = Literal["tensorboard", "wandb", "trackio"]


class Trackers:
    """The trackers of one run, in its first process."""

    def __init__(
        self,
        names: Sequence[Tracker],
        folder: Path,
        stage: str,
        settings: Mapping[str, Any],
        first_step: int | None = None,
    ) -> None:
        """Start the trackers.

        Args:
            folder: Where they write.
            settings: The settings in use, for the tables of runs of W&B and trackio.
            first_step: The first step of a resumed run; None for a new one. TensorBoard then hides
                the interrupted run's rows from this step on, and the others start a new run.
        """
        # Imported here, because settings files import this module only for its names, and
        # accelerate takes seconds.
        from accelerate.tracking import TensorBoardTracker, TrackioTracker, WandBTracker

        self._trackers: list[GeneralTracker] = []
        for name in names:
            (folder / name).mkdir(parents=True, exist_ok=True)
            tracker: GeneralTracker
            if name == "tensorboard":
                tracker = TensorBoardTracker("", folder / name, purge_step=first_step)
            elif name == "wandb":
                tracker = WandBTracker(stage, **_wandb_settings(folder, settings))
            else:
                tracker = TrackioTracker(stage, **_trackio_settings(folder, settings))
            tracker.start()
            self._trackers.append(tracker)

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Log the numbers of one step."""
        numbers = {name: value for name, value in metrics.items() if not isinstance(value, str)}
        for tracker in self._trackers:
            tracker.log(numbers, step=step)

    def samples(self, step: int | None, rows: Sequence[Mapping[str, Any]]) -> None:
        """Log the texts of one step as a table."""
        columns = list(dict.fromkeys(name for row in rows for name in row))
        cells = [[str(row.get(name, "")) for name in columns] for row in rows]
        for tracker in self._trackers:
            if tracker.name == "wandb":
                tracker.log_table(SAMPLES_TABLE, columns=columns, data=cells, step=step)
            elif tracker.name == "trackio":
                tracker.log({SAMPLES_TABLE: _trackio_table(columns, cells)}, step=step)
            else:
                tracker.log({SAMPLES_TABLE: _markdown(columns, cells)}, step=step)

    def finish(self) -> None:
        for tracker in self._trackers:
            tracker.finish()


def check_trackers(names: Sequence[str]) -> None:
    """Raise ValueError for a tracker whose package is not installed."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise ValueError(
                f"trackers has {name}, which is not installed; run `pip install {name}`, or leave "
                "it out: metrics.jsonl holds the same figures"
            )


def is_logged_in_to_wandb() -> bool:
    """Return whether a key is set or was stored by `wandb login`, without asking a server."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
    path = os.environ.get("NETRC", Path.home() / ".netrc")
    try:
        return netrc.netrc(path).authenticators(str(host)) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _wandb_settings(folder: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # else it reports its errors to W&B
    import wandb

    mode = os.environ.get("WANDB_MODE", "online" if is_logged_in_to_wandb() else "offline")
    return {
        "dir": str(folder / "wandb"),
        "name": folder.parent.name,
        "config": dict(settings),
        "mode": mode,
        "settings": wandb.Settings(console="off", silent=True, disable_git=True, save_code=False),
    }


def _trackio_settings(folder: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    # Trackio reads these when it is imported. The last two would send metrics and samples to
    # another machine.
    os.environ["TRACKIO_DIR"] = str((folder / "trackio").resolve())
    for variable in ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL"):
        os.environ.pop(variable, None)
    name = folder.parent.name
    return {"name": name, "config": plain_values(settings), "embed": False, "auto_log_cpu": False}


def _trackio_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Any:
    import trackio

    return trackio.Table(columns=list(columns), data=[list(row) for row in rows])


def _markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Format a table for TensorBoard. Replace line breaks and bars, which would end a cell."""
    lines = [columns, ["---"] * len(columns), *rows]
    safe = [[cell.replace("|", "\\|").replace("\n", "<br>") for cell in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in safe)
