"""Decides who owns an output folder: what a program may replace in it, and what must stay.

.rlhf_run.json   the mark: the program that took the folder, its settings and inputs, and the names
                 of the files that it writes; only this module writes it
.rlhf_run.lock   the process and machine of a program that is writing to the folder

A folder that is not empty and has no mark belongs to somebody else and is refused. In a folder with
a mark, only the files that the mark names are removed or replaced.
"""

import errno
import json
import os
import shutil
import socket
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from fnmatch import fnmatchcase
from itertools import islice
from pathlib import Path
from typing import Any

import yaml

from rlhf.inputs.whole_files import write_text
from rlhf.runs.files import FileHashes

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

MARK = ".rlhf_run.json"
LOCK = ".rlhf_run.lock"
FORMAT = 1
CONFIG = "config.yaml"
LINEAGE = "lineage.json"
METRICS = "metrics.jsonl"
SAMPLES = "samples.jsonl"
ALARMS = "alarms.jsonl"
PAGE = "report.html"
RESULTS = "results.json"

SAVED_WEIGHTS = (
    "model.safetensors",
    "model-*-of-*.safetensors",
    "model.safetensors.index.json",
)
"""Names and patterns of the files that hold the weights of a full model."""
MODEL_FILES = (
    "config.json",
    "generation_config.json",
    *SAVED_WEIGHTS,
    "adapter_config.json",
    "adapter_model.safetensors",
    "base.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "additional_chat_templates",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
)
"""Names and patterns of the files that saving a model and its tokenizer writes."""

UNIMPORTANT = (
    "output_dir",
    "run_dir",
    "overwrite",
    "force",
    "checkpoint_every",
    "policy_every",
    "trackers",
)
"""Settings that do not change what a run computes."""
MAX_SHOWN = 5
"""Maximum number of differences or files in an error message."""

_HOLDER_BYTES = 4096
"""Maximum size of a lock file."""
_NOT_LOCKED = (errno.EACCES, errno.EAGAIN)
"""Error numbers that mean another process holds the lock. Any other error means that this file
system has no locks."""


@dataclass(frozen=True, kw_only=True)
class Mark:
    """The content of the mark in a folder."""

    program: str
    """Name of the program that took the folder."""
    files: tuple[str, ...]
    """Files that the program wrote, relative to the folder. Until it has finished: patterns of all
    files that it may write."""
    settings: dict[str, Any] | None = None
    """The program's settings. None means that it has not begun to write."""
    inputs: dict[str, Any] = field(default_factory=dict)
    """Maps the name of each input to its content (see `content_of`)."""
    code: dict[str, str] = field(default_factory=dict)
    """Hashes of the code (see `rlhf.runs.code.code_of`). Marks of earlier versions have none."""
    hashed: dict[str, list[Any]] = field(default_factory=dict)
    """Hashes of the input files (see `rlhf.runs.files.FileHashes`)."""


class UpToDate(Exception):
    """Says that the output folder already holds what the program would make.

    `folders_released` prints its text and ends the program. The text is empty in all processes
    but the first.
    """


@dataclass
class OutputFolder:
    """A folder that this process may write to, from `acquire_folder` until `release`."""

    path: Path
    program: str
    files: tuple[str, ...]
    _found: Mark | None
    _lock: int
    _new_folders: list[Path]
    is_other: bool = False
    """Whether the folder holds a run of other settings, other inputs or another program."""
    outdated: str = ""
    """Why the finished run in the folder is not current. Empty if it is, or if there is none."""
    _settings: dict[str, Any] = field(default_factory=dict)
    _inputs: dict[str, Any] = field(default_factory=dict)
    _code: dict[str, str] = field(default_factory=dict)
    _hashed: dict[str, list[Any]] = field(default_factory=dict)
    _begun: bool = False

    @property
    def code(self) -> dict[str, str]:
        """Hashes of the code, as `compare` got them."""
        return self._code

    @property
    def holder(self) -> str:
        """The text of the lock file, which names this process and the time."""
        return os.pread(self._lock, _HOLDER_BYTES, 0).decode()

    @property
    def known_hashes(self) -> dict[str, list[Any]]:
        """Hashes of the input files of the finished run in the folder, for `FileHashes`. They only
        help to decide whether that run is current; a new run hashes its inputs in full."""
        return self._found.hashed if self._found is not None and self._is_finished else {}

    @property
    def is_current(self) -> bool:
        """Whether the folder holds the finished run that `compare` described."""
        is_known = self._found is not None and self._found.settings is not None
        return is_known and self._is_finished and not self.outdated

    @property
    def _is_finished(self) -> bool:
        return (self.path / RESULTS).is_file()

    def compare(
        self,
        settings: Mapping[str, Any],
        inputs: Mapping[str, Any],
        *,
        code: Mapping[str, str],
        hashed: Mapping[str, list[Any]],
        overwrite: bool,
        has_checkpoint: bool = False,
    ) -> None:
        """Store what the program is about to do, and compare it with the folder's mark.

        Args:
            inputs: Maps the name of each input to its content (see `content_of`).
            code: Hashes of the code (see `rlhf.runs.code.code_of`).
            hashed: The input files, as FileHashes recorded them.
            overwrite: Whether the results of other settings may be replaced.
            has_checkpoint: Whether the folder holds a checkpoint. If so nothing is refused here,
                because the checkpoint says more about what differs (`rlhf.runs.checkpoints`).

        Raises:
            ValueError: The folder holds a run of other settings or inputs.
        """
        important = {name: one for name, one in settings.items() if name not in UNIMPORTANT}
        self._settings, self._inputs = _as_read(important), _as_read(inputs)
        self._code, self._hashed = dict(code), dict(hashed)
        self.outdated = ""
        found = self._found
        if found is None or found.settings is None:
            return
        if found.program != self.program:
            self.is_other = True
            self.outdated = f"it is of {found.program}" if self._is_finished else ""
            return
        then = {"settings": found.settings, "inputs": found.inputs}
        differences = find_differences(then, {"settings": self._settings, "inputs": self._inputs})
        shown = list(islice(differences, MAX_SHOWN))
        self.is_other = bool(shown)
        if shown and not overwrite and not has_checkpoint:
            state = "finished" if self._is_finished else "unfinished"
            raise ValueError(
                f"output_dir {self.path} holds the {state} run of other settings: "
                f"{'; '.join(shown)}; give another output_dir, or --overwrite to replace what that "
                "run wrote"
            )
        if has_checkpoint and not shown:
            self._code = found.code  # the first part of a resumed run was made by that code
        if self._is_finished:
            self.outdated = "; ".join(shown) or self._why_remade(found)

    def _why_remade(self, found: Mark) -> str:
        """Return why a finished run of equal settings and inputs is not current; empty if it is."""
        if found.code != self._code:
            return "the code has changed since"
        lost = [name for name in found.files if not (self.path / name).exists()]
        return f"{_shown(lost)} is gone" if lost else ""

    def begin(self, replaced: Iterable[str] = ()) -> None:
        """Start writing to the folder: remove what is to be replaced and write the mark.

        Args:
            replaced: Names and patterns of the files to remove now. If the folder holds a run of
                other settings, everything that run wrote is removed too.
        """
        self._begun = True
        self.path.mkdir(parents=True, exist_ok=True)
        self.remove(replaced)
        if self.is_other and self._found is not None:
            self.remove(self._found.files)
        self._write_mark(self.files)

    def remove(self, files: Iterable[str]) -> None:
        """Remove all files with these names or patterns, and folders that are empty after that."""
        for pattern in files:
            for path in self.path.glob(pattern):
                _remove(path)
            if "/" in pattern:
                with suppress(OSError):  # the folder holds files of others, or is not there
                    (self.path / pattern).parent.rmdir()

    def finish(self) -> None:
        """List the written files in the mark, and give the folder back."""
        self._write_mark(_present(self.path, self.files))
        self.release()

    def release(self) -> None:
        """Let other processes take the folder. Without `begin`, leave it as it was before."""
        if _taken.pop(self.path.resolve(), None) is None:
            return
        with suppress(FileNotFoundError):
            if not self._begun and self._found is None:
                (self.path / MARK).unlink()
        with suppress(FileNotFoundError):
            (self.path / LOCK).unlink()
        os.close(self._lock)
        if not self._begun:
            for folder in reversed(self._new_folders):
                with suppress(OSError):  # not empty, or gone
                    folder.rmdir()

    def _write_mark(self, files: Sequence[str]) -> None:
        mark = Mark(
            program=self.program,
            files=tuple(files),
            settings=self._settings if self._begun else None,
            inputs=self._inputs if self._begun else {},
            code=self._code if self._begun else {},
            hashed=self._hashed if self._begun else {},
        )
        text = json.dumps({"format": FORMAT, **asdict(mark)}, ensure_ascii=False, indent=1) + "\n"
        write_text(self.path / MARK, text)


_taken: dict[Path, OutputFolder] = {}
"""The folders that this process has taken and not given back."""


@contextmanager
def folders_released() -> Iterator[None]:
    """Give back, at the end of the block or decorated function, all folders taken in it.

    An error gives them back too. If UpToDate is raised, its text is printed, and the block ends
    there without an error.
    """
    try:
        with _given_back():
            yield
    except UpToDate as answer:
        if str(answer):
            print(answer, flush=True)


@contextmanager
def _given_back() -> Iterator[None]:
    before = set(_taken)
    try:
        yield
    finally:
        for path in set(_taken) - before:
            _taken[path].release()


def acquire_folder(
    output_dir: str | Path,
    *,
    program: str,
    files: Sequence[str],
    overwrite: bool,
    is_shared: bool = False,
) -> OutputFolder:
    """Take a folder for one process and mark it, before anything else is written.

    Args:
        program: Name of the program, such as sft.
        files: Names and patterns of all files that it may write, relative to the folder.
        overwrite: Whether a run of another program may be replaced.
        is_shared: Whether the folder may also hold other things, such as the folders of other
            runs. These are left alone.

    Raises:
        ValueError: The folder is a file, holds files of others or the run of another program, or
            another process has taken it.
        OSError: The folder cannot be written.
    """
    path = Path(output_dir)
    if earlier := _taken.get(path.resolve()):
        earlier.release()
    _refuse_files_of_others(path, program, files, overwrite, is_shared)
    new_folders = [one for one in [*reversed(path.parents), path] if not one.exists()]
    path.mkdir(parents=True, exist_ok=True)
    try:
        lock = _acquire(path / LOCK, f"output_dir {path}")
    except BaseException:
        for one in reversed(new_folders):
            with suppress(OSError):
                one.rmdir()
        raise
    folder = OutputFolder(path, program, tuple(files), None, lock, new_folders)
    _taken[path.resolve()] = folder
    try:  # check once more, now that nobody else can change the folder
        folder._found = _refuse_files_of_others(path, program, files, overwrite, is_shared)
        if folder._found is None:
            folder._write_mark(())
    except BaseException:
        folder.release()
        raise
    return folder


@contextmanager
def writing(
    output_dir: str | Path,
    *,
    program: str,
    files: Sequence[str],
    settings: Mapping[str, Any],
    inputs: Mapping[str, str | Path] | None = None,
    code: Mapping[str, str],
    overwrite: bool,
    force: bool,
) -> Iterator[OutputFolder]:
    """Take a folder for a program that is not a run of a stage.

    Inside the block the program calls `begin` before it writes and `finish` at the end. The
    arguments are those of `acquire_folder` and `OutputFolder.compare`. All files below an input
    count.

    Args:
        force: Whether to run even if the folder is up to date.

    Raises:
        ValueError: As refuse_inputs_inside, acquire_folder and OutputFolder.compare.
        UpToDate: The folder holds what the program would make.
    """
    places = {name: Path(place) for name, place in (inputs or {}).items()}
    refuse_inputs_inside(output_dir, places, files=files)
    with _given_back():
        folder = acquire_folder(output_dir, program=program, files=files, overwrite=overwrite)
        for known in (folder.known_hashes, {}):  # first with the recorded hashes, then in full
            hashes = FileHashes(known)
            contents = {
                name: hashes.of_all(place) for name, place in places.items() if place.exists()
            }
            folder.compare(
                settings, contents, code=code, hashed=hashes.recorded, overwrite=overwrite
            )
            if folder.is_current and not force:
                raise UpToDate(up_to_date(program, folder.path))
            if not known:
                break
        yield folder


def up_to_date(program: str, folder: Path) -> str:
    """Return the message that the finished run in a folder is current."""
    made = time.localtime((folder / RESULTS).stat().st_mtime)
    return (
        f"{program}: up to date: {folder} (made {time.strftime('%Y-%m-%d %H:%M', made)}); --force "
        "runs it anyway"
    )


def add_to_mark(folder: Path, name: str) -> None:
    """Add a file to a folder's mark, if it has one, so that its program may replace the file."""
    mark = _read_mark(folder)
    if mark is not None and not any(fnmatchcase(name, pattern) for pattern in mark.files):
        text = json.dumps(
            {"format": FORMAT, **asdict(replace(mark, files=(*mark.files, name)))},
            ensure_ascii=False,
            indent=1,
        )
        write_text(folder / MARK, text + "\n")


@contextmanager
def locked_file(output: str | Path) -> Iterator[None]:
    """Make the file's folder, and keep other processes from writing the file in the block.

    This serves programs that write one file into a folder of others.

    Raises:
        ValueError: Another process writes the file.
        OSError: The folder cannot be written.
    """
    path = Path(output)
    new_folders = [one for one in reversed(path.parents) if not one.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    place = path.with_name(f".{path.name}.lock")
    lock = _acquire(place, f"output {path}")
    try:
        yield
    finally:
        place.unlink(missing_ok=True)
        os.close(lock)
        for folder in reversed(new_folders):
            with suppress(OSError):  # not empty
                folder.rmdir()


def refuse_inputs_inside(
    output_dir: str | Path,
    inputs: Mapping[str, str | Path],
    *,
    files: Sequence[str] = (),
    is_shared: bool = False,
) -> None:
    """Refuse inputs that the program could overwrite.

    Args:
        inputs: Paths by name. Those that do not exist, such as a hub id, are ignored.
        files: Names and patterns of the files that are written.
        is_shared: Whether inputs in other folders below the output folder may be read. Those
            folders are left alone.

    Raises:
        ValueError: An input is the output folder, or lies in it.
    """
    output = Path(output_dir).resolve()
    written = {pattern.split("/")[0] for pattern in files if "/" in pattern}
    for name, source in inputs.items():
        for path in _places(Path(source)):
            if path == output:
                raise ValueError(
                    f"output_dir {output_dir} is also what {name} is read from, and would be "
                    "written over; give another folder"
                )
            if output not in path.parents:
                continue
            first = path.relative_to(output).parts[0]
            if is_shared and (output / first).is_dir() and first not in written:
                continue
            raise ValueError(
                f"{name} is read from {source}, which lies in output_dir {output_dir}, where files "
                "are written and removed; give another output_dir"
            )


def content_of(described: Mapping[str, Any]) -> Any:
    """Return what identifies an input of lineage.json: its hashes, or its hub id.

    Its path and the run that made it are left out."""
    return [described.get(key) for key in ("sha256", "base", "hub")]


def contents_of(inputs: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Map the name of each input that lineage.json describes to its content."""
    return {name: content_of(described) for name, described in inputs.items()}


def find_differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """Yield a description of each difference of two runs; `contents_of` makes their `inputs`."""
    settings = [dict(flat_settings(run["settings"])) for run in (then, now)]
    for name in dict.fromkeys([*settings[0], *settings[1]]):
        before, after = (of_run.get(name, "no setting") for of_run in settings)
        if name not in UNIMPORTANT and not _are_equal(before, after):
            yield f"{name} was {before} and is {after}"
    for name in dict.fromkeys([*then["inputs"], *now["inputs"]]):
        if then["inputs"].get(name) != now["inputs"].get(name):
            yield f"what {name} names was other data"


def flat_settings(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (name, value) of every setting; one in a section is named section.name."""
    for key, value in settings.items():
        if isinstance(value, dict) and value:
            yield from flat_settings(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _are_equal(before: object, after: object) -> bool:
    if isinstance(before, str) and isinstance(after, str) and before and after:
        return os.path.normpath(before) == os.path.normpath(after)  # "runs/sft" is "runs/sft/"
    return before == after


def _as_read(value: Mapping[str, Any]) -> dict[str, Any]:
    """Return the value as it is after JSON wrote and read it: tuples are lists."""
    return json.loads(json.dumps(value))


def _places(path: Path) -> Iterator[Path]:
    """Yield the places of an input: its own, and the targets of the links that it is or holds."""
    if not path.exists():
        return
    yield path.parent.resolve() / path.name if path.name != ".." else path.resolve()
    yield path.resolve()
    if path.is_dir():
        yield from (one.resolve() for one in path.iterdir() if one.is_symlink())


def _refuse_files_of_others(
    path: Path, program: str, files: Sequence[str], overwrite: bool, is_shared: bool
) -> Mark | None:
    """Return the folder's mark; None if the folder is new.

    Raises:
        ValueError: The program may not replace something that is in the folder.
    """
    place = next(one for one in [path, *path.parents] if one.exists())
    if not place.is_dir():
        raise ValueError(f"output_dir is {path}, but {place} is a file; give another folder")
    if place != path:
        return None
    mark = _read_mark(path) or _read_old_mark(path, program, files)
    if mark is None:
        in_the_way = (
            _present(path, files)
            if is_shared
            else sorted(one.name for one in path.iterdir() if one.name not in (MARK, LOCK))
        )
        what = "which this program did not write (there is no mark of it in the folder)"
    elif mark.program != program and not overwrite:
        raise ValueError(
            f"output_dir {path} holds a run of {mark.program}, and this is {program}; give another "
            "output_dir, or --overwrite to replace what that run wrote"
        )
    else:
        in_the_way = [
            name
            for name in _present(path, files)
            if not any(fnmatchcase(name, pattern) for pattern in mark.files)
        ]
        what = f"which the run of {mark.program} in it did not write"
    if in_the_way:
        raise ValueError(
            f"output_dir {path} holds {_shown(in_the_way)}, {what}; move that away, or "
            "give another output_dir, such as a new folder"
        )
    return mark


def _read_mark(folder: Path) -> Mark | None:
    path = folder / MARK
    if not path.is_file():
        return None
    try:
        body = json.loads(path.read_bytes())
        if body.pop("format") != FORMAT:
            raise ValueError("it is of another version of the program")
        return Mark(**{**body, "files": tuple(body["files"])})
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{path} cannot be read ({error}), so it cannot be told which files of the folder are "
            "this program's; give another output_dir"
        ) from error


def _read_old_mark(folder: Path, program: str, files: Sequence[str]) -> Mark | None:
    """Make a mark for a folder of an early version, which wrote no marks.

    Settings and lineage of the same program prove the same, since nothing else writes both. Return
    None if they are missing."""
    try:
        lineage = json.loads((folder / LINEAGE).read_bytes())
        settings = yaml.safe_load((folder / CONFIG).read_text(encoding="utf-8"))
        is_ours = {"stage", "inputs", "commit", "versions"} <= set(lineage)
        if not is_ours or lineage["stage"] != program or "output_dir" not in dict(settings):
            return None
        inputs = contents_of(lineage["inputs"])
        settings = _as_read(settings)
    except (OSError, ValueError, TypeError, AttributeError, RecursionError, yaml.YAMLError):
        return None
    return Mark(program=program, files=tuple(files), settings=settings, inputs=inputs)


def _present(folder: Path, files: Iterable[str]) -> list[str]:
    """Return the files in the folder that match these names and patterns."""
    found = {path.relative_to(folder).as_posix() for one in files for path in folder.glob(one)}
    return sorted(found)


def _shown(names: Sequence[str]) -> str:
    more = f" and {len(names) - MAX_SHOWN} more" if len(names) > MAX_SHOWN else ""
    return ", ".join(names[:MAX_SHOWN]) + more


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _acquire(place: Path, what: str) -> int:
    """Return the descriptor of a lock file, held until it closes or the process dies.

    Args:
        what: Setting and value that the lock guards, for the message.

    Raises:
        ValueError: Another process holds it.
    """
    while True:
        lock = os.open(place, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            _hold(lock, place, what)
            if _is_still(lock, place):
                break
        except BaseException:
            os.close(lock)
            raise
        os.close(lock)  # its holder removed the file after we opened it and before we locked it
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    holder = {"pid": os.getpid(), "host": socket.gethostname(), "since": since}
    os.ftruncate(lock, 0)
    os.pwrite(lock, json.dumps(holder).encode(), 0)
    return lock


def _is_still(lock: int, place: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(lock), place.stat())
    except FileNotFoundError:
        return False


def _hold(lock: int, place: Path, what: str) -> None:
    """Raise ValueError if another process holds the lock."""
    try:
        if fcntl is not None:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
    except OSError as error:
        if error.errno in _NOT_LOCKED:
            raise ValueError(_in_use(what, _holder(lock))) from None
    # If the file system has no locks, only the file's content tells who holds it.
    holder = _holder(lock)
    is_here = holder.get("host") == socket.gethostname()
    if holder and not (is_here and _has_ended(holder["pid"])):
        where = f"; if that process is gone, delete {place}"
        raise ValueError(_in_use(what, holder) + ("" if is_here else where))


def _holder(lock: int) -> dict[str, Any]:
    try:
        os.lseek(lock, 0, os.SEEK_SET)
        holder = json.loads(os.read(lock, _HOLDER_BYTES))
    except ValueError:
        return {}
    return holder if isinstance(holder, dict) and {"pid", "host", "since"} <= set(holder) else {}


def _in_use(what: str, holder: Mapping[str, Any]) -> str:
    who = "another process"
    if holder:
        who = f"process {holder['pid']} on {holder['host']}, since {holder['since']}"
    return (
        f"{what} is in use: {who} is at work in it; wait for its end, or give another "
        f"{what.split()[0]}"
    )


def _has_ended(pid: int) -> bool:
    """Return whether no other process on this machine has this id."""
    import psutil  # imported here, since only file systems without locks need it

    return pid == os.getpid() or not psutil.pid_exists(pid)
