"""Sample text from a base model, to stand in for its pretraining data.

    python -m data.replay --model.path runs/smollm2/base --output_dir runs/smollm2/replay

The pretraining mix of PPO-ptx keeps what the base model knows, if its text is like the text the
base model learned from. Few people have that text. A sample of the model itself follows the same
distribution as far as the model knows it: minus the log-probability of such text, averaged, is the
KL divergence from the base model to the policy, plus a constant. The idea is pseudorehearsal
(Robins 1995, "Catastrophic forgetting, rehearsal and pseudorehearsal").
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from data.record_files import write_record_files
from rlhf.generation.engines import engine_of
from rlhf.generation.interface import Decoding
from rlhf.generation.settings import GenerationSettings
from rlhf.inputs.ranges import Positive, PositiveInt
from rlhf.inputs.records import Record, Text
from rlhf.inputs.streams import torch_stream
from rlhf.models.limits import check_context
from rlhf.models.loading import load_policy
from rlhf.models.settings import ModelSettings
from rlhf.models.tokenizers import load_chat
from rlhf.runs.program import run_stage
from rlhf.runs.settings import FolderSettings
from rlhf.runs.stopwatch import progress_shown

FILES = ("text.jsonl", "text_held_out.jsonl")


@dataclass(frozen=True, kw_only=True)
class ReplayConfig(FolderSettings):
    """Write documents that a base model samples, to train on and held out."""

    output_dir: str
    """Folder to write."""
    model: ModelSettings
    """The base model."""
    document_start: str | None = None
    """Special token that documents began with in pretraining, such as <|endoftext|>. Give PPO the
    same as ptx.document_start. None means the tokenizer's BOS (or EOS) token."""
    num_texts: PositiveInt = 400
    """Documents of text.jsonl."""
    num_texts_held_out: PositiveInt = 40
    """Documents of text_held_out.jsonl."""
    max_tokens: PositiveInt = 256
    """Length at which a document is cut."""
    temperature: Positive = 1.0
    """Sampling temperature. Only at 1 do the documents follow the model's own distribution."""
    generation: GenerationSettings = field(default_factory=GenerationSettings)
    seed: int = 0
    """Seed of the draws."""


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


if __name__ == "__main__":
    run_stage(build, ReplayConfig)
