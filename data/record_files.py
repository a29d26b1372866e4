"""Write the folder of record files that a data program makes from other files."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from rlhf.inputs.files import write_records
from rlhf.inputs.records import Record
from rlhf.runs.code import code_of
from rlhf.runs.files import write_json
from rlhf.runs.folder import folders_released, refuse_inputs_inside, writing
from rlhf.runs.settings import FolderSettings

RESULTS_FILE = "results.json"
"""File that is written last, so that a folder without it is unfinished."""


def _num_rows(records: Sequence[Record]) -> str:
    return f"{len(records)} rows"


@folders_released()
def write_record_files(
    config: FolderSettings,
    folder: Path,
    make_files: Callable[[], Mapping[str, Sequence[Record]]],
    *,
    program: str,
    names: Sequence[str],
    sources: Mapping[str, Path],
    inputs: Mapping[str, Path],
    describe: Callable[[Sequence[Record]], str] = _num_rows,
) -> None:
    """Write record files; each appears only when it is whole, and results.json comes last.

    Args:
        config: the program's settings.
        folder: folder to write.
        make_files: returns the records of each file by its name.
        program: name of the program, for the folder's mark.
        names: names of the files that `make_files` makes.
        sources: maps a setting to the folder that it names, which must not lie in `folder`.
        inputs: maps a name to the file that is read.
        describe: says in a few words what a file holds, for the line that is printed.

    Raises:
        ValueError: the folder holds an input, another program's files, or a run of other settings.
        OSError: an input is missing.
    """
    settings = asdict(config)
    refuse_inputs_inside(folder, {name: str(path) for name, path in sources.items()})
    with writing(
        folder,
        program=program,
        files=(*names, RESULTS_FILE),
        settings=settings,
        inputs=inputs,
        code=code_of(config, settings),
        overwrite=config.overwrite,
        force=config.force,
    ) as output:
        files = make_files()
        output.begin([RESULTS_FILE])
        for name, records in files.items():
            write_records(folder / name, records)
            print(f"wrote {folder / name}: {describe(records)}")
        write_json(folder / RESULTS_FILE, {name: len(rows) for name, rows in files.items()})
        output.finish()
