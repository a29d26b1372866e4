"""Turn demonstrations and pieces of text into prompt trees of token ids, and check their length."""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import islice

from rlhf.inputs.chat import Chat
from rlhf.inputs.files import read_records, split_by_prompt
from rlhf.inputs.fitting import fit_prompt
from rlhf.inputs.packing import PromptTree, text_tree
from rlhf.inputs.records import Demonstration, Text, name_rows, naming_row
from rlhf.inputs.streams import python_stream
from stages.sft.config import Config


@dataclass(frozen=True, kw_only=True)
class Example:
    """Holds a demonstration and its tree: the prompt is context, the response and its end token are
    trained."""

    record: Demonstration
    tree: PromptTree


@dataclass(frozen=True, kw_only=True)
class LengthReport:
    """Counts the demonstrations that did not fit."""

    num_read: int
    num_prompts_cut: int
    """Prompts that lost their oldest turns."""
    num_prompts_dropped: int
    """Demonstrations dropped because the last turn alone is too long."""
    num_responses_dropped: int
    """Demonstrations dropped because the response is too long."""
    num_empty: int
    """Demonstrations kept although their response has no text. They teach the policy to end at
    once."""
    dropped: tuple[Demonstration, ...] = field(repr=False)
    """Demonstrations that were dropped. An error message names their rows."""

    @property
    def num_dropped(self) -> int:
        return self.num_prompts_dropped + self.num_responses_dropped

    def as_metrics(self) -> dict[str, int]:
        """Return the counts, without the rows."""
        return {name: value for name, value in vars(self).items() if name != "dropped"}


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Holds the rows to train on and the rows to measure."""

    train: list[Example]
    held_out: list[Example]
    text: list[PromptTree]
    text_held_out: list[PromptTree]
    lengths: LengthReport

    @property
    def text_share(self) -> float:
        """Share of the trained tokens that are text."""
        num_text = _num_trained(self.text)
        return num_text / (num_text + _num_trained([one.tree for one in self.train]))


def load_rows(config: Config, chat: Chat) -> Rows:
    """Read, render and split demonstrations and text.

    Raises:
        ValueError: a row is no record, too many demonstrations are too long, or nothing is left to
            train on or to hold out.
    """
    demonstrations = read_records(config.demonstrations, Demonstration)
    if config.num_demonstrations is not None and config.num_demonstrations < len(demonstrations):
        generator = python_stream(config.seed, "sft/demonstrations")
        demonstrations = generator.sample(demonstrations, config.num_demonstrations)
    sides = split_by_prompt(demonstrations, config.held_out, config.seed)
    train, held_out = (
        render(side, chat, config.max_prompt_tokens, config.max_response_tokens) for side in sides
    )
    lengths = _add(train[1], held_out[1])
    _check_dropped(lengths, config)
    if not train[0] or not held_out[0]:
        raise ValueError(
            f"{config.demonstrations}: {len(train[0])} demonstrations to train on and "
            f"{len(held_out[0])} held out are left after dropping those that are too long; raise "
            "max_prompt_tokens or max_response_tokens, or held_out"
        )
    text, text_held_out = _load_text(config, chat, [one.tree for one in train[0]])
    return Rows(
        train=train[0],
        held_out=held_out[0][: config.max_held_out],
        text=text,
        text_held_out=text_held_out,
        lengths=lengths,
    )


def render(
    demonstrations: Sequence[Demonstration],
    chat: Chat,
    max_prompt_tokens: int,
    max_response_tokens: int,
) -> tuple[list[Example], LengthReport]:
    """Turn demonstrations that fit into token ids; also return counts of those cut or dropped."""
    examples = []
    num_cut = num_prompts_dropped = 0
    dropped = []
    for record in demonstrations:
        prompt = fit_prompt(record, chat, max_prompt_tokens)
        with naming_row(record):
            response = chat.response_ids(record.response)
        if prompt is None or len(response) > max_response_tokens:
            num_prompts_dropped += prompt is None
            dropped.append(record)
        else:
            tree = PromptTree(prompt=prompt.ids, responses=(tuple(response),))
            examples.append(Example(record=record, tree=tree))
            num_cut += prompt.is_cut
    report = LengthReport(
        num_read=len(demonstrations),
        num_prompts_cut=num_cut,
        num_prompts_dropped=num_prompts_dropped,
        num_responses_dropped=len(dropped) - num_prompts_dropped,
        num_empty=sum(not one.record.response.strip() for one in examples),
        dropped=tuple(dropped),
    )
    return examples, report


def cut_text(
    texts: Sequence[Text], chat: Chat, max_tokens: int, generator: random.Random
) -> list[PromptTree]:
    """Cut documents into pieces of at most max_tokens, in random order.

    The first token of a piece is context, and the others are trained (see text_tree). So a piece of
    one token is left out.
    """
    pieces = []
    for record in texts:
        with naming_row(record):
            ids = chat.text_ids(record.text)
        pieces += [ids[start : start + max_tokens] for start in range(0, len(ids), max_tokens)]
    generator.shuffle(pieces)
    return [text_tree(piece) for piece in pieces if len(piece) > 1]


def fit_batches(config: Config, num_rows: int, num_processes: int) -> Config:
    """Limit batch_size in the settings to the number of rows, rounded up to equal shares of the
    processes."""
    own_rows = math.ceil(num_rows / num_processes)
    return replace(config, batch_size=min(config.batch_size, own_rows * num_processes))


def order_epochs(
    trees: Sequence[PromptTree],
    num_epochs: int,
    batch_size: int,
    seed: int,
    full_batch_size: int | None = None,
) -> list[PromptTree]:
    """Lay out all epochs one after the other, each in a new order.

    The last batch is filled up from one more epoch, so that the processes share every batch evenly.
    Within a batch the longest rows come first. This puts rows of similar length next to each other,
    and changes no batch.

    Args:
        full_batch_size: rows of a batch, idle ones included. Idle rows train nothing; they let the
            processes share a batch of all rows evenly. None means batch_size, without idle rows.
    """
    generator = python_stream(seed, "sft/order")
    num_rows = math.ceil(num_epochs * len(trees) / batch_size) * batch_size
    ordered: list[PromptTree] = []
    while len(ordered) < num_rows:
        ordered += generator.sample(trees, len(trees))
    batches = (ordered[start : start + batch_size] for start in range(0, num_rows, batch_size))
    idle = PromptTree(prompt=trees[0].prompt[:1], responses=((),))
    num_idle = 0 if full_batch_size is None else full_batch_size - batch_size
    return [
        tree
        for batch in batches
        for tree in [
            *sorted(batch, key=lambda tree: tree.num_tokens, reverse=True),
            *[idle] * num_idle,
        ]
    ]


def _load_text(
    config: Config, chat: Chat, trees: Sequence[PromptTree]
) -> tuple[list[PromptTree], list[PromptTree]]:
    """Return the pieces to train on, as many as text_share asks for, and the held-out pieces."""
    if config.text is None:
        return [], []
    texts = split_by_prompt(read_records(config.text, Text), config.held_out, config.seed)
    generator = python_stream(config.seed, "sft/text")
    train, held_out = (cut_text(side, chat, config.max_text_tokens, generator) for side in texts)
    if not held_out or (config.text_share and not train):
        raise ValueError(
            f"{config.text}: no document of two tokens or more on one side of held_out"
        )
    num_wanted = config.text_share / (1 - config.text_share) * _num_trained(trees)
    return _take_tokens(train, num_wanted), held_out[: config.max_held_out]


def _take_tokens(trees: Sequence[PromptTree], num_tokens: float) -> list[PromptTree]:
    """Return the first trees whose trained tokens reach the number, or all if none reach it."""
    num_taken = total = 0
    for tree in trees:
        if total >= num_tokens:
            break
        total += _num_trained([tree])
        num_taken += 1
    return list(islice(trees, num_taken))


def _num_trained(trees: Sequence[PromptTree]) -> int:
    return sum(len(response) for tree in trees for response in tree.responses)


def _add(first: LengthReport, second: LengthReport) -> LengthReport:
    return LengthReport(
        **{name: value + getattr(second, name) for name, value in vars(first).items()}
    )


def _check_dropped(lengths: LengthReport, config: Config) -> None:
    share = lengths.num_dropped / lengths.num_read
    if share > config.max_dropped:
        raise ValueError(
            f"{lengths.num_dropped} of {lengths.num_read} demonstrations ({share:.1%}) are too "
            f"long{name_rows(lengths.dropped)}: {lengths.num_prompts_dropped} prompts over "
            f"max_prompt_tokens {config.max_prompt_tokens}, {lengths.num_responses_dropped} "
            f"responses over max_response_tokens {config.max_response_tokens}; raise these, or "
            f"max_dropped {config.max_dropped} to train without them"
        )
