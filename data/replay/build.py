"""Sample the documents and write them, results.json last."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from data.record_files import write_record_files
from data.replay.config import ReplayConfig
from rlhf.generation.engines import engine_of
from rlhf.generation.interface import Decoding
from rlhf.inputs.records import Record, Text
from rlhf.inputs.streams import torch_stream
from rlhf.models.limits import check_context
from rlhf.models.loading import load_policy
from rlhf.models.tokenizers import load_chat
from rlhf.runs.stopwatch import progress_shown

FILES = ("text.jsonl", "text_held_out.jsonl")


def build(config: ReplayConfig) -> None:
    """Write the files; each appears only when it is whole, and results.json comes last."""
    write_record_files(
        config,
        Path(config.output_dir),
        partial(sample_texts, config),
        program="data.replay",
        names=FILES,
        sources={"model": Path(config.model.path)},
        inputs={"model": Path(config.model.path)},
    )


def sample_texts(config: ReplayConfig) -> dict[str, Sequence[Record]]:
    """Return the records of each file by its name.

    A document of white space alone is drawn again.

    Raises:
        ValueError: document_start is no special token of the tokenizer, documents are longer than
            the model reads, or more than half of a draw is empty.
    """
    chat = load_chat(config.model)
    start_id = chat.document_start(config.document_start)
    model = load_policy(config.model)
    check_context(model, config.model.path, {"max_tokens": config.max_tokens})
    decoding = Decoding(
        end_id=start_id,
        other_ends=tuple({chat.end_id, *chat.other_ends} - {start_id}),
        max_new_tokens=config.max_tokens,
        temperature=config.temperature,
    )
    generator = torch_stream(config.seed, "replay/samples")
    wanted = config.num_texts + config.num_texts_held_out
    texts: list[str] = []
    with (
        engine_of(model, config.generation) as engine,
        progress_shown("replay: documents", wanted) as progress,
    ):
        while (missing := wanted - len(texts)) > 0:
            samples = engine.generate([[start_id]] * missing, decoding, generator, progress)
            drawn = [chat.decode(ids) for ids in samples.responses]
            found = [text for text in drawn if text.strip()]
            if len(found) < missing / 2:
                raise ValueError(
                    f"{missing - len(found)} of {missing} documents of {config.model.path} are "
                    "empty; give --document_start the token that documents began with in "
                    "pretraining"
                )
            texts += found
    records = [Text(text=text) for text in texts]
    return {FILES[0]: records[: config.num_texts], FILES[1]: records[config.num_texts :]}
