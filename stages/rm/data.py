"""Turn rankings into token ids, and count all that is left out."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from rlhf.inputs.chat import Chat
from rlhf.inputs.files import read_records, split_by_prompt
from rlhf.inputs.fitting import fit_prompt
from rlhf.inputs.packing import PromptTree
from rlhf.inputs.records import (
    Demonstration,
    Ranking,
    name_rows,
    naming_row,
    prompt_key,
    with_equal_responses,
)
from rlhf.inputs.streams import python_stream
from stages.rm.config import Config


@dataclass(frozen=True)
class Example:
    """Holds one ranking, with its prompt and responses as token ids."""

    tree: PromptTree
    ranking: Ranking
    """The ranking of the responses in the tree."""
    is_cut: bool
    """Whether the prompt lost its oldest turns."""


@dataclass
class Counts:
    """Counts what was kept and left out of one set of rankings."""

    rankings: int = 0
    """Rankings read."""
    kept: int = 0
    without_pairs: int = 0
    """Rankings dropped because they compare no two responses that fit."""
    prompts_too_long: int = 0
    """Rankings dropped because the last turn alone is over max_prompt_tokens."""
    prompts_cut: int = 0
    """Rankings kept without the oldest turns of their prompt."""
    responses_too_long: int = 0
    """Responses left out of their ranking."""
    rankings_with_long_responses: int = 0
    """Rankings that lost such a response."""
    longest_response: int = 0
    """Tokens of the longest response read, its end-of-response token included."""
    equal_pairs: int = 0
    """Pairs left out because their two responses are the same."""
    long_rows: list[Ranking] = field(default_factory=list)
    """Rankings that lost something to the length limits. An error message names their rows."""

    def as_metrics(self) -> dict[str, int]:
        return {name: value for name, value in vars(self).items() if name != "long_rows"}


def read_rankings(config: Config) -> tuple[list[Ranking], list[Ranking]]:
    """Read the training and the held-out rankings; no prompt is in both.

    Raises:
        ValueError: a record is bad, or a set has no rankings.
    """
    records = _read_all(config.rankings, config.max_rankings, config.seed)
    if config.held_out is not None:
        return split_by_prompt(records, config.held_out, config.seed)
    assert config.held_out_rankings is not None
    held_out = _read_all(config.held_out_rankings, config.max_held_out, config.seed)
    measured = {prompt_key(record.prompt) for record in held_out}
    train = [record for record in records if prompt_key(record.prompt) not in measured]
    if len(train) < len(records):
        print(f"rm: {len(records) - len(train)} rankings share a held-out prompt: not trained on")
    if not train:
        raise ValueError(
            "all prompts of rankings are in held_out_rankings too, so nothing is left to train on; "
            "give other files, or held_out: 0.1 to split one"
        )
    return train, held_out


def make_examples(
    rankings: Sequence[Ranking], chat: Chat, config: Config, *, for_training: bool
) -> tuple[list[Example], Counts]:
    """Turn rankings into token ids; also return the counts of what was left out.

    Training keeps only responses that take part in a pair, and at most `max_responses` of them.
    Measuring keeps all, since the gold score may order what the labelers left tied.

    Raises:
        ValueError: more than `max_dropped` of the rankings lost something to the length limits.
    """
    counts = Counts(rankings=len(rankings))
    examples = []
    for ranking in rankings:
        example = _make_example(ranking, chat, config, for_training, counts)
        if example is not None:
            examples.append(example)
    counts.kept = len(examples)
    _check_dropped(counts, config)
    return examples, counts


def make_demonstrations(
    demonstrations: Sequence[Demonstration], chat: Chat, config: Config
) -> list[PromptTree]:
    """Draw demonstrations within the length limits for the bias.

    Raises:
        ValueError: no demonstration fits.
    """
    order = list(demonstrations)
    python_stream(config.seed, "rm/demonstrations").shuffle(order)
    trees: list[PromptTree] = []
    for record in order:
        prompt = fit_prompt(record, chat, config.max_prompt_tokens)
        with naming_row(record):
            response = chat.response_ids(record.response)
        if prompt is not None and len(response) <= config.max_response_tokens:
            trees.append(PromptTree(prompt.ids, (tuple(response),)))
        if len(trees) == config.num_demonstrations:
            break
    if not trees:
        raise ValueError(
            f"no demonstration of {config.demonstrations} is within max_prompt_tokens "
            f"{config.max_prompt_tokens} and max_response_tokens {config.max_response_tokens}; "
            "raise these limits"
        )
    return trees


def _read_all(sources: Sequence[str], limit: int | None, seed: int) -> list[Ranking]:
    """Read up to `limit` records of each source; a record without a source gets its file's name."""
    rankings = []
    for source in sources:
        records = read_records(source, Ranking)
        name = Path(source).name.split(".")[0]
        if limit is not None and limit < len(records):
            records = python_stream(seed, f"rm/rankings/{name}").sample(records, limit)
        rankings += [replace(record, source=record.source or name) for record in records]
    return rankings


def _make_example(
    ranking: Ranking, chat: Chat, config: Config, for_training: bool, counts: Counts
) -> Example | None:
    prompt = fit_prompt(ranking, chat, config.max_prompt_tokens)
    if prompt is None:
        counts.prompts_too_long += 1
        counts.long_rows.append(ranking)
        return None
    with naming_row(ranking):
        responses = [tuple(chat.response_ids(response)) for response in ranking.responses]
    ranking = with_equal_responses(ranking, responses)
    counts.equal_pairs += len(ranking.equal_pairs())
    counts.longest_response = max(counts.longest_response, *map(len, responses))
    fitting = [i for i, ids in enumerate(responses) if len(ids) <= config.max_response_tokens]
    counts.responses_too_long += len(responses) - len(fitting)
    if len(fitting) < len(responses):
        counts.rankings_with_long_responses += 1
        counts.long_rows.append(ranking)
    kept = _draw_in_pairs(ranking, fitting, config) if for_training else fitting
    if len(kept) < 2:
        counts.without_pairs += 1
        return None
    counts.prompts_cut += prompt.is_cut
    return Example(
        tree=PromptTree(prompt.ids, tuple(responses[i] for i in kept)),
        ranking=ranking.restricted_to(kept),
        is_cut=prompt.is_cut,
    )


def _draw_in_pairs(ranking: Ranking, fitting: list[int], config: Config) -> list[int]:
    """Draw the responses to train on from those that fit; each takes part in at least one pair."""
    drawn = fitting
    if config.max_responses is not None and len(fitting) > config.max_responses:
        generator = python_stream(config.seed, f"rm/responses/{prompt_key(ranking.prompt)}")
        drawn = sorted(generator.sample(fitting, config.max_responses))
    pairs = [{i, j} for i, j, _ in ranking.preferences() if {i, j} <= set(drawn)]
    return [i for i in drawn if any(i in pair for pair in pairs)]


def _check_dropped(counts: Counts, config: Config) -> None:
    long = counts.prompts_too_long + counts.rankings_with_long_responses
    if long > config.max_dropped * counts.rankings:
        raise ValueError(
            f"{long} of {counts.rankings} rankings ({long / counts.rankings:.1%})"
            f"{name_rows(counts.long_rows)} have a prompt "
            f"over max_prompt_tokens {config.max_prompt_tokens} ({counts.prompts_too_long}) or a "
            f"response over max_response_tokens {config.max_response_tokens} "
            f"({counts.rankings_with_long_responses}), more than max_dropped "
            f"{config.max_dropped}; raise one of the three. The longest response has "
            f"{counts.longest_response} tokens, the end-of-response token included"
        )
