"""Convert rows to records, with one function for each public layout and kind of record.

A converter yields records. It yields `Dropped(reason)` for a row (or a branch of a tree) that gives
none, and `Changed(reason)` besides a record that is not the row word for word. It raises a
LayoutError if the row has another layout.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from math import isfinite
from statistics import fmean
from types import UnionType
from typing import Any

from rlhf.inputs.records import (
    ROLES,
    Demonstration,
    Messages,
    Prompt,
    PromptLike,
    Ranking,
    Record,
    Text,
    show,
)


@dataclass(frozen=True)
class Dropped:
    """Says why a row gives no record."""

    reason: str


@dataclass(frozen=True)
class Changed:
    """Says how a record differs from its row."""

    reason: str


class LayoutError(ValueError):
    """Raised when a row does not have the layout that the converter reads."""


Converter = Callable[[Any], Iterator[Record | Dropped | Changed]]
Comparison = tuple[PromptLike, tuple[str, ...], tuple[int | None, ...]]

_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):")
_ROLES = {
    "Human": "user",
    "Assistant": "assistant",
    "prompter": "user",
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "developer": "system",
}
"""Maps the names of speakers in public layouts to ours; other names stay."""
_CALCULATOR = re.compile(r"<<[^<>]*>>")
_END_OF_TEXT = "<|endoftext|>"

NO_RESPONSE = Dropped("no response")
NO_PROMPT = Dropped("no prompt")
ONE_RESPONSE = Dropped("fewer than two responses")
NO_ORDER = Dropped("no response is ranked above another")


def ranks_from_scores(scores: list[float | None]) -> tuple[int | None, ...]:
    """Return competition ranks: 1 for the highest score, ties for equal scores, None for None."""
    known = [score for score in scores if score is not None]
    return tuple(
        None if score is None else 1 + sum(other > score for other in known) for score in scores
    )


def parse_transcript(text: str) -> Messages:
    """Parse `\\n\\nHuman: ...\\n\\nAssistant: ...` into messages; text before any mark is the
    user's."""
    start, *rest = _TURN.split(text)
    turns = [
        {"role": _ROLES[name], "content": said.strip()}
        for name, said in zip(rest[::2], rest[1::2], strict=True)
    ]
    return [{"role": "user", "content": start.strip()}, *turns] if start.strip() else turns


# Anthropic hh-rlhf: {"chosen": transcript, "rejected": transcript}; the last turns differ


def hh_rankings(row: Any) -> Iterator[Record | Dropped | Changed]:
    prompt, chosen = _split_transcript(_text(row, "chosen"))
    rejected_prompt, rejected = _split_transcript(_text(row, "rejected"))
    if prompt != rejected_prompt:
        yield Dropped("chosen and rejected have different prompts")
    elif chosen == rejected:
        yield Dropped("chosen and rejected are equal")
    else:
        yield from _ranking(prompt, [chosen, rejected], (1, 2), source="hh")


def hh_demonstrations(row: Any) -> Iterator[Record | Dropped | Changed]:
    yield from _demonstration(*_split_transcript(_text(row, "chosen")))


def hh_prompts(row: Any) -> Iterator[Record | Dropped | Changed]:
    yield from _prompt(_split_transcript(_text(row, "chosen"))[0])


# OpenAI summarize_from_feedback, comparisons:
# {"info": {"post", "title", "subreddit"}, "summaries": [{"text"}, {"text"}], "choice": 0 or 1}


def tldr_rankings(row: Any) -> Iterator[Record | Dropped | Changed]:
    chosen, rejected = _tldr_summaries(row)
    worker = row.get("worker")
    yield from _ranking(
        _tldr_prompt(row), [chosen, rejected], (1, 2), source="tldr", labeler=worker
    )


def tldr_demonstrations(row: Any) -> Iterator[Record | Dropped | Changed]:
    yield from _demonstration(_tldr_prompt(row), _tldr_summaries(row)[0])


def tldr_prompts(row: Any) -> Iterator[Record | Dropped | Changed]:
    yield from _prompt(_tldr_prompt(row))


def _tldr_prompt(row: Any) -> str:
    """Make the query of arXiv 2009.01325, table 4; a news article has no title and no subreddit."""
    info = _take(row, "info", dict)
    if info.get("post") is None and isinstance(info.get("article"), str):
        return f"Article:\n{info['article'].strip()}\n\nTL;DR:"
    title, post = info.get("title") or "", _text(info, "post").strip()
    return f"SUBREDDIT: r/{_text(info, 'subreddit')}\n\nTITLE: {title}\n\nPOST: {post}\n\nTL;DR:"


def _tldr_summaries(row: Any) -> tuple[str, str]:
    summaries, choice = _take(row, "summaries", list), _take(row, "choice", int)
    if len(summaries) != 2 or choice not in (0, 1):
        raise LayoutError(
            f"expected 2 summaries and choice 0 or 1, found {len(summaries)}, {choice}"
        )
    return _text(summaries[choice], "text").strip(), _text(summaries[1 - choice], "text").strip()


# openbmb/UltraFeedback: {"instruction", "completions": [completion] * 4}, where
# completion = {"response", "annotations": {aspect: {"Rating"}}, "overall_score"}


def ultrafeedback_rankings(row: Any) -> Iterator[Record | Dropped | Changed]:
    prompt, responses, ranks = _ultrafeedback(row)
    yield from _ranking(prompt, list(responses), ranks, source="ultrafeedback", labeler="gpt-4")


def ultrafeedback_demonstrations(row: Any) -> Iterator[Record | Dropped | Changed]:
    yield from _best_demonstration(*_ultrafeedback(row))


def ultrafeedback_prompts(row: Any) -> Iterator[Record | Dropped | Changed]:
    yield from _prompt(_text(row, "instruction"))


def _ultrafeedback(row: Any) -> Comparison:
    completions = _take(row, "completions", list)
    responses = tuple(_text(completion, "response").strip() for completion in completions)
    ranks = ranks_from_scores([_ultrafeedback_score(completion) for completion in completions])
    return _text(row, "instruction"), responses, ranks


def _ultrafeedback_score(completion: Any) -> float | None:
    """Return the mean rating over the aspects, or overall_score if there is no rating.

    overall_score is the second choice, since it is 10 for some answers that the critique calls
    worthless: a 1.0 was misread. The makers of argilla/ultrafeedback-binarized-preferences found
    this.
    """
    annotations = _take({"annotations": {}} | completion, "annotations", dict)
    ratings = [
        _number(aspect.get("Rating")) for aspect in annotations.values() if isinstance(aspect, dict)
    ]
    known = [rating for rating in ratings if rating is not None]
    return fmean(known) if known else _number(completion.get("overall_score"))


# OpenAssistant trees: {"prompt": node}, where
# node = {"text", "role": prompter or assistant, "replies": [node, ...], "rank": 0 best}


def oasst_rankings(row: Any) -> Iterator[Record | Dropped | Changed]:
    for prompt, responses, ranks in _oasst_comparisons(row):
        yield from _ranking(prompt, list(responses), ranks, source="oasst", labeler="human")


def oasst_demonstrations(row: Any) -> Iterator[Record | Dropped | Changed]:
    for prompt, responses, ranks in _oasst_comparisons(row):
        if len(responses) < 2:
            yield from _demonstration(prompt, "".join(responses))
        else:
            yield from _best_demonstration(prompt, responses, ranks)


def oasst_prompts(row: Any) -> Iterator[Record | Dropped | Changed]:
    for prompt, _, _ in _oasst_comparisons(row):
        yield from _prompt(prompt)


def _oasst_comparisons(row: Any) -> Iterator[Comparison]:
    """Yield the conversation up to each prompter node, with its replies that are not deleted."""
    open_nodes: list[tuple[Messages, Any]] = [([], _take(row, "prompt", dict))]
    while open_nodes:
        history, node = open_nodes.pop()
        role = _text(node, "role")
        turn = {"role": _ROLES.get(role, role), "content": _text(node, "text").strip()}
        prompt = [*history, turn]
        replies = [
            reply
            for reply in _take({"replies": []} | node, "replies", list)
            if not (isinstance(reply, dict) and reply.get("deleted"))
        ]
        open_nodes += [(prompt, reply) for reply in reversed(replies)]
        if role == "prompter":
            responses = tuple(_text(reply, "text").strip() for reply in replies)
            yield prompt, responses, tuple(_oasst_rank(reply) for reply in replies)


def _oasst_rank(reply: Any) -> int | None:
    rank = reply.get("rank")
    return None if rank is None else 1 + _take(reply, "rank", int)


# Instruction data: Alpaca, Dolly, self-instruct's seed tasks, GSM8K, P3


def alpaca_demonstrations(row: Any) -> Iterator[Record | Dropped | Changed]:
    yield from _demonstration(_alpaca_prompt(row), _text(row, "output"))


def alpaca_prompts(row: Any) -> Iterator[Record | Dropped | Changed]:
    yield from _prompt(_alpaca_prompt(row))


def _alpaca_prompt(row: Any) -> str:
    return _with_input(_text(row, "instruction"), row.get("input"))


def dolly_demonstrations(row: Any) -> Iterator[Record | Dropped | Changed]:
    yield from _demonstration(_dolly_prompt(row), _text(row, "response"))


def dolly_prompts(row: Any) -> Iterator[Record | Dropped | Changed]:
    yield from _prompt(_dolly_prompt(row))


def _dolly_prompt(row: Any) -> str:
    return _with_input(_text(row, "instruction"), row.get("context"))


def self_instruct_demonstrations(row: Any) -> Iterator[Record | Dropped | Changed]:
    instruction = _text(row, "instruction")
    for instance in _take(row, "instances", list):
        prompt = _with_input(instruction, _text(instance, "input"))
        yield from _demonstration(prompt, _text(instance, "output"))


def self_instruct_prompts(row: Any) -> Iterator[Record | Dropped | Changed]:
    for instance in _take(row, "instances", list):
        yield from _prompt(_with_input(_text(row, "instruction"), _text(instance, "input")))


def gsm8k_demonstrations(row: Any) -> Iterator[Record | Dropped | Changed]:
    """Remove the marks `<<48/2=24>>`, which are for a calculator; `#### 24` stays."""
    yield from _demonstration(_text(row, "question"), _CALCULATOR.sub("", _text(row, "answer")))


def gsm8k_prompts(row: Any) -> Iterator[Record | Dropped | Changed]:
    _, mark, answer = _text(row, "answer").rpartition("####")
    if not mark:
        yield Dropped("no final answer after ####")
        return
    yield from _prompt(_text(row, "question"), answer=answer.strip().replace(",", ""))


def p3_demonstrations(row: Any) -> Iterator[Record | Dropped | Changed]:
    completion = _text(row, "completion").replace(_END_OF_TEXT, "")
    yield from _demonstration(_text(row, "prompt"), completion)


def p3_prompts(row: Any) -> Iterator[Record | Dropped | Changed]:
    completion = _text(row, "completion").replace(_END_OF_TEXT, "").strip()
    if not completion:
        yield NO_RESPONSE
        return
    yield from _prompt(_text(row, "prompt"), answer=completion)


# Chat data: {"messages": [{"role", "content"}, ...]}, or ShareGPT's
# {"conversations": [{"from": "human", "value"}, ...], "system"?}; the last turn is the response


def messages_demonstrations(row: Any) -> Iterator[Record | Dropped | Changed]:
    yield from _answered(_read_turns(_take(row, "messages", list)))


def messages_prompts(row: Any) -> Iterator[Record | Dropped | Changed]:
    yield from _asked(_read_turns(_take(row, "messages", list)))


def sharegpt_demonstrations(row: Any) -> Iterator[Record | Dropped | Changed]:
    yield from _answered(_sharegpt_turns(row))


def sharegpt_prompts(row: Any) -> Iterator[Record | Dropped | Changed]:
    yield from _asked(_sharegpt_turns(row))


def _sharegpt_turns(row: Any) -> Messages | Dropped:
    name = "conversation" if isinstance(row, dict) and "conversation" in row else "conversations"
    turns = _read_turns(_take(row, name, list))
    system = row.get("system")
    if isinstance(turns, Dropped) or not isinstance(system, str) or not system.strip():
        return turns
    return [{"role": "system", "content": system.strip()}, *turns]


# Preference data: {"prompt", "chosen", "rejected"}, each a text or a list of messages. Without the
# field `prompt`, both lists begin with the prompt; with the field, they may.


def preference_rankings(row: Any) -> Iterator[Record | Dropped | Changed]:
    better, worse = _preferred(row, "chosen"), _preferred(row, "rejected")
    if isinstance(better, Dropped) or isinstance(worse, Dropped):
        yield next(one for one in (better, worse) if isinstance(one, Dropped))
        return
    (prompt, chosen), (rejected_prompt, rejected) = better, worse
    if prompt != rejected_prompt:
        yield Dropped("chosen and rejected have different prompts")
    elif chosen == rejected:
        yield Dropped("chosen and rejected are equal")
    else:
        yield from _ranking(prompt, [chosen, rejected], (1, 2), source=None)


def preference_demonstrations(row: Any) -> Iterator[Record | Dropped | Changed]:
    better = _preferred(row, "chosen")
    if isinstance(better, Dropped):
        yield better
    else:
        yield from _demonstration(*better)


def preference_prompts(row: Any) -> Iterator[Record | Dropped | Changed]:
    better = _preferred(row, "chosen")
    if isinstance(better, Dropped):
        yield better
    else:
        yield from _prompt(better[0])


def _preferred(row: Any, name: str) -> tuple[Messages, str] | Dropped:
    """Return the prompt and the response of `chosen` or of `rejected`."""
    answer = _take(row, name, str | list)
    if "prompt" not in row:
        if isinstance(answer, str):
            raise LayoutError(
                f"no field 'prompt', and {name} is a text; format hh reads transcripts"
            )
        return _split_answer(_read_turns(answer))
    return _joined(_take(row, "prompt", str | list), answer)


# {"prompt", "completion", "label"?}; prompt and completion are a text or a list of messages each


def prompt_completion_demonstrations(row: Any) -> Iterator[Record | Dropped | Changed]:
    pair = _joined(_take(row, "prompt", str | list), _take(row, "completion", str | list))
    if row.get("label") is False:
        yield Dropped("label is false: the completion was not liked")
    elif isinstance(pair, Dropped):
        yield pair
    else:
        yield from _demonstration(*pair)


def prompt_completion_prompts(row: Any) -> Iterator[Record | Dropped | Changed]:
    prompt = _read_prompt(_take(row, "prompt", str | list))
    if isinstance(prompt, Dropped):
        yield prompt
    else:
        yield from _prompt(prompt)


# Two columns of text whose names the user gives


def columns_demonstrations(
    row: Any, *, prompt_column: str = "prompt", response_column: str = "response"
) -> Iterator[Record | Dropped | Changed]:
    yield from _demonstration(_text(row, prompt_column), _text(row, response_column))


def columns_prompts(
    row: Any, *, prompt_column: str = "prompt", response_column: str = "response"
) -> Iterator[Record | Dropped | Changed]:
    """Make prompts that hold the response as the answer in their meta, for a reward to compare."""
    answer = row.get(response_column) if isinstance(row, dict) else None
    yield from _prompt(_text(row, prompt_column), **({"answer": answer} if answer else {}))


# K-wise rankings:
# {"prompt", "responses": [{"text", "rank": 1 best, "score", "model"}, ...], "source", "judge"}


def kwise_rankings(row: Any) -> Iterator[Record | Dropped | Changed]:
    prompt, responses, ranks = _kwise(row)
    source, judge = row.get("source"), row.get("judge")
    yield from _ranking(prompt, list(responses), ranks, source=source, labeler=judge)


def kwise_demonstrations(row: Any) -> Iterator[Record | Dropped | Changed]:
    yield from _best_demonstration(*_kwise(row))


def kwise_prompts(row: Any) -> Iterator[Record | Dropped | Changed]:
    yield from _prompt(parse_transcript(_text(row, "prompt")))


def _kwise(row: Any) -> Comparison:
    answers = _take(row, "responses", list)
    responses = tuple(_text(answer, "text").strip() for answer in answers)
    ranks = tuple(_take(answer, "rank", int) for answer in answers)
    return parse_transcript(_text(row, "prompt")), responses, ranks


# Prompts alone: one JSON string a line, IFEval, MT-bench


def string_prompts(row: Any) -> Iterator[Record | Dropped | Changed]:
    if not isinstance(row, str):
        raise LayoutError(f"expected a JSON string a line, found {show(row)}")
    yield from _prompt(row)


def ifeval_prompts(row: Any) -> Iterator[Record | Dropped | Changed]:
    yield from _prompt(
        _text(row, "prompt"),
        key=row.get("key"),
        instruction_id_list=_take(row, "instruction_id_list", list),
        kwargs=_take(row, "kwargs", list),
    )


def mt_bench_prompts(row: Any) -> Iterator[Record | Dropped | Changed]:
    """Make a prompt of the first turn.

    Later turns need the model's own answer, so they are kept in meta.follow_ups.
    """
    turns = _take(row, "turns", list)
    if not turns or not isinstance(turns[0], str):
        raise LayoutError(f"field 'turns': expected a list of strings, found {show(turns)}")
    first, *follow_ups = turns
    facts = {name: row[name] for name in ("question_id", "category", "reference") if name in row}
    yield from _prompt(first, follow_ups=follow_ups, **facts)


# Plain text: readers.py has already cut it into documents


def plain_texts(row: Any) -> Iterator[Record | Dropped | Changed]:
    text = _text(row, "text")
    yield Text(text) if text.strip() else Dropped("no text")


CONVERTERS: dict[str, dict[str, Converter]] = {
    "hh": {"ranking": hh_rankings, "demonstration": hh_demonstrations, "prompt": hh_prompts},
    "tldr": {
        "ranking": tldr_rankings,
        "demonstration": tldr_demonstrations,
        "prompt": tldr_prompts,
    },
    "ultrafeedback": {
        "ranking": ultrafeedback_rankings,
        "demonstration": ultrafeedback_demonstrations,
        "prompt": ultrafeedback_prompts,
    },
    "oasst": {
        "ranking": oasst_rankings,
        "demonstration": oasst_demonstrations,
        "prompt": oasst_prompts,
    },
    "kwise": {
        "ranking": kwise_rankings,
        "demonstration": kwise_demonstrations,
        "prompt": kwise_prompts,
    },
    "alpaca": {"demonstration": alpaca_demonstrations, "prompt": alpaca_prompts},
    "dolly": {"demonstration": dolly_demonstrations, "prompt": dolly_prompts},
    "self_instruct": {
        "demonstration": self_instruct_demonstrations,
        "prompt": self_instruct_prompts,
    },
    "gsm8k": {"demonstration": gsm8k_demonstrations, "prompt": gsm8k_prompts},
    "p3": {"demonstration": p3_demonstrations, "prompt": p3_prompts},
    "messages": {"demonstration": messages_demonstrations, "prompt": messages_prompts},
    "sharegpt": {"demonstration": sharegpt_demonstrations, "prompt": sharegpt_prompts},
    "preference": {
        "ranking": preference_rankings,
        "demonstration": preference_demonstrations,
        "prompt": preference_prompts,
    },
    "prompt_completion": {
        "demonstration": prompt_completion_demonstrations,
        "prompt": prompt_completion_prompts,
    },
    "columns": {"demonstration": columns_demonstrations, "prompt": columns_prompts},
    "strings": {"prompt": string_prompts},
    "ifeval": {"prompt": ifeval_prompts},
    "mt_bench": {"prompt": mt_bench_prompts},
    "text": {"text": plain_texts},
}
"""Maps format to kind to converter. A format's first kind is its default."""


def _split_transcript(text: str) -> tuple[Messages, str]:
    turns = parse_transcript(text)
    if not turns or turns[-1]["role"] != "assistant":
        raise LayoutError("the transcript does not end with an `Assistant:` turn")
    return turns[:-1], turns[-1]["content"]


def _read_turns(turns: list[Any]) -> Messages | Dropped:
    """Read turns with role and content, or with from and value; or say why they cannot be read."""
    messages: Messages = []
    for turn in turns:
        name = _text(turn, "role" if isinstance(turn, dict) and "role" in turn else "from")
        name = _ROLES.get(name, name)
        text = _read_content(turn.get("content", turn.get("value")))
        if name not in ROLES:
            return Dropped(f"a turn of the role {show(name)}")
        if text is None:
            return Dropped("a turn that is no text")
        if name == "system" and messages:
            return Dropped("a system turn that is not the first")
        if text.strip() or name != "system":
            messages.append({"role": name, "content": text.strip()})
    return messages


def _read_content(content: object) -> str | None:
    """Return the text of a turn, which may be a list of parts; None if a part is not text."""
    if isinstance(content, list):
        parts = [part.get("text") if isinstance(part, dict) else part for part in content]
        texts = [part for part in parts if isinstance(part, str)]
        return "".join(texts) if len(texts) == len(parts) else None
    return content if isinstance(content, str) else None


def _read_prompt(prompt: str | list[Any]) -> Messages | Dropped:
    if isinstance(prompt, list):
        return _read_turns(prompt)
    if not prompt.lstrip().startswith("Human:"):
        return [{"role": "user", "content": prompt.strip()}]
    turns = parse_transcript(prompt)
    is_open = turns[-1] == {"role": "assistant", "content": ""}  # the response continues here
    return turns[:-1] if is_open else turns


def _split_answer(turns: Messages | Dropped) -> tuple[Messages, str] | Dropped:
    """Split a conversation into its prompt and the assistant's last turn."""
    if isinstance(turns, Dropped):
        return turns
    if not turns or turns[-1]["role"] != "assistant":
        return Dropped("the conversation does not end with an assistant turn")
    return turns[:-1], turns[-1]["content"]


def _joined(prompt: str | list[Any], answer: str | list[Any]) -> tuple[Messages, str] | Dropped:
    """Return prompt and response; the answer is a text, new turns, or the whole conversation."""
    before = _read_prompt(prompt)
    if isinstance(before, Dropped):
        return before
    if isinstance(answer, str):
        return before, answer.strip()
    after = _read_turns(answer)
    if isinstance(after, Dropped):
        return after
    if after and after[0]["role"] != "assistant":
        system = [turn for turn in before if turn["role"] == "system"]
        is_whole = after[0]["role"] == "system"
        return _split_answer(after if is_whole else [*system, *after])
    return _split_answer([*before, *after])


def _answered(turns: Messages | Dropped) -> Iterator[Record | Dropped | Changed]:
    pair = _split_answer(turns)
    if isinstance(pair, Dropped):
        yield pair
    else:
        yield from _demonstration(*pair)


def _asked(turns: Messages | Dropped) -> Iterator[Record | Dropped | Changed]:
    """Make a prompt of the conversation up to its last user turn."""
    if isinstance(turns, Dropped):
        yield turns
        return
    while turns and turns[-1]["role"] == "assistant":
        turns = turns[:-1]
    yield from _prompt(turns)


def _ranking(
    prompt: PromptLike,
    responses: list[str],
    ranks: tuple[int | None, ...],
    *,
    source: str | None,
    labeler: str | None = None,
) -> Iterator[Record | Dropped | Changed]:
    if len(responses) < 2:
        yield ONE_RESPONSE
        return
    if len({rank for rank in ranks if rank is not None}) < 2:
        yield NO_ORDER
        return
    make = partial(Ranking, responses=tuple(responses), ranks=ranks, source=source, labeler=labeler)
    yield from _tidied(prompt, make)


def _demonstration(prompt: PromptLike, response: str) -> Iterator[Record | Dropped | Changed]:
    if not response.strip():
        yield NO_RESPONSE
        return
    yield from _tidied(prompt, partial(Demonstration, response=response.strip()))


def _best_demonstration(
    prompt: PromptLike, responses: tuple[str, ...], ranks: tuple[int | None, ...]
) -> Iterator[Record | Dropped | Changed]:
    """Make a demonstration of the first of the best-ranked responses."""
    ranked = [(rank, i) for i, rank in enumerate(ranks) if rank is not None]
    if not ranked:
        yield Dropped("no response is ranked")
        return
    yield from _demonstration(prompt, responses[min(ranked)[1]])


def _prompt(prompt: PromptLike, **meta: Any) -> Iterator[Record | Dropped | Changed]:
    yield from _tidied(prompt, partial(Prompt, meta=meta))


def _tidied(
    prompt: PromptLike, make: Callable[[PromptLike], Record]
) -> Iterator[Record | Dropped | Changed]:
    """Bring a prompt into the order that chat templates take: a user turn first and last."""
    if isinstance(prompt, str):
        yield make(prompt.strip()) if prompt.strip() else NO_PROMPT
        return
    turns = _join_neighbours(prompt)
    first = next((i for i, turn in enumerate(turns) if turn["role"] != "system"), 0)
    if turns and turns[first]["role"] == "assistant":
        turns = [*turns[:first], *turns[first + 1 :]]
        yield Changed("an assistant turn before the first user turn was cut off")
    if not turns or not all(turn["content"] for turn in turns if turn["role"] == "user"):
        yield NO_PROMPT
    elif turns[-1]["role"] != "user":
        yield Dropped("the prompt does not end with a user turn")
    elif len(turns) == 1 and turns[0]["role"] == "user":
        yield make(turns[0]["content"])
    else:
        yield make(turns)


def _join_neighbours(turns: Messages) -> Messages:
    """Join neighbouring turns of one role into one turn."""
    return [
        {"role": role, "content": "\n\n".join(filter(None, (turn["content"] for turn in group)))}
        for role, group in groupby(turns, key=lambda turn: turn["role"])
    ]


def _with_input(instruction: str, extra: object) -> str:
    if extra is not None and not isinstance(extra, str):
        raise LayoutError(f"the input of an instruction is {show(extra)}: expected a string")
    parts = (instruction.strip(), (extra or "").strip())
    return "\n\n".join(part for part in parts if part)


def _text(row: Any, name: str) -> str:
    value = _take(row, name, str)
    assert isinstance(value, str)
    return value


def _take(row: Any, name: str, kind: type | UnionType) -> Any:
    if not isinstance(row, dict) or name not in row:
        found = ", ".join(row) if isinstance(row, dict) else show(row)
        raise LayoutError(f"no field {name!r} (found: {found})")
    if not isinstance(row[name], kind):
        expected = kind.__name__ if isinstance(kind, type) else str(kind).replace(" | ", " or ")
        raise LayoutError(f"field {name!r}: expected {expected}, found {show(row[name])}")
    return row[name]


def _number(value: object) -> float | None:
    """Return a number, even if it is written as text; "N/A", NaN and the like give None."""
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        return None
    return number if isfinite(number) else None
