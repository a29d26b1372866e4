"""Use IFEval's own prompts (Zhou et al. 2023) whose instructions our checks know."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from data.instructions.checks import Instruction, follows_one
from rlhf.inputs.records import Prompt

if TYPE_CHECKING:
    from datasets import Dataset

MOST = {
    "words_at_least": 30,
    "sentences_at_least": 3,
    "times_at_least": 2,
    "characters_at_least": 10,
    "bullets": 4,
}
"""Largest counts that a response of some 48 tokens can meet."""


def known_prompts(prompts: Iterable[Prompt]) -> Iterator[Prompt]:
    """Yield the prompts of IFEval whose instructions can all be checked and met here.

    Args:
        prompts: prompts made by data.convert, with IFEval's fields in their meta.
    """
    for prompt in prompts:
        instructions = _translated(prompt.meta)
        known = [one for one in instructions if one is not None and _fits(one)]
        if len(known) == len(instructions):
            yield Prompt(prompt.prompt, {"instructions": known})


def keep_known(rows: "Dataset") -> "Dataset":
    """Keep the rows of IFEval whose instructions can all be checked here, of any length."""
    return rows.select([i for i, row in enumerate(rows) if None not in _translated(row)])


def grade(row: Mapping[str, Any], responses: Sequence[str]) -> dict[str, Any]:
    """Check the response to a row of IFEval, as a task of lm-evaluation-harness.

    Returns:
        `prompt_level_acc`: whether the response follows all instructions. `inst_level_acc`: whether
        it follows each.
    """
    known = [one for one in _translated(row) if one is not None]
    followed = [follows_one(responses[0], one) for one in known]
    return {"prompt_level_acc": all(followed), "inst_level_acc": followed}


def mean_of_all(followed: Sequence[Sequence[bool]]) -> float:
    """Return the share of instructions that are followed, over all prompts."""
    outcomes = [outcome for of_prompt in followed for outcome in of_prompt]
    return sum(outcomes) / len(outcomes)


def _translated(row: Mapping[str, Any]) -> list[Instruction | None]:
    """Translate all instructions of a row of IFEval."""
    pairs = zip(row["instruction_id_list"], row["kwargs"], strict=True)
    return [from_ifeval(name, kwargs) for name, kwargs in pairs]


def from_ifeval(name: str, kwargs: dict[str, Any]) -> Instruction | None:
    """Translate an instruction of IFEval into one of checks.py; None if no check knows it."""
    match name:
        case "punctuation:no_comma":
            return {"kind": "no_comma"}
        case "change_case:english_lowercase":
            return {"kind": "lowercase"}
        case "change_case:english_capital":
            return {"kind": "uppercase"}
        case "startend:quotation":
            return {"kind": "quoted"}
        case "startend:end_checker":
            return {"kind": "ends_with", "phrase": kwargs["end_phrase"]}
        case "keywords:existence":
            return {"kind": "contains", "words": kwargs["keywords"]}
        case "keywords:forbidden_words":
            return {"kind": "avoids", "words": kwargs["forbidden_words"]}
        case "detectable_format:number_bullet_lists":
            return {"kind": "bullets", "count": kwargs["num_bullets"]}
        case "length_constraints:number_words":
            return _counted("words", kwargs["relation"], kwargs["num_words"])
        case "length_constraints:number_sentences":
            return _counted("sentences", kwargs["relation"], kwargs["num_sentences"])
        case "keywords:frequency":
            counted = _counted("times", kwargs["relation"], kwargs["frequency"])
            return {**counted, "word": kwargs["keyword"]}
        case "keywords:letter_frequency":
            counted = _counted("characters", kwargs["let_relation"], kwargs["let_frequency"])
            return {**counted, "character": kwargs["letter"]}
    return None


def _counted(what: str, relation: str, count: int) -> Instruction:
    """Translate IFEval's relations, which are "at least n" and "less than n"."""
    if relation == "at least":
        return {"kind": f"{what}_at_least", "count": count}
    assert relation == "less than", relation
    return {"kind": f"{what}_at_most", "count": count - 1}


def _fits(instruction: Instruction) -> bool:
    most = MOST.get(instruction["kind"])
    return most is None or instruction["count"] <= most
