"""Select those of IFEval's own prompts (Zhou et al. 2023) that our checks and few tokens allow."""

from collections.abc import Iterable, Iterator
from typing import Any

from data.instructions.checks import Instruction
from rlhf.inputs.records import Prompt

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
        rows = zip(prompt.meta["instruction_id_list"], prompt.meta["kwargs"], strict=True)
        instructions = [from_ifeval(name, kwargs) for name, kwargs in rows]
        known = [one for one in instructions if one is not None and _fits(one)]
        if len(known) == len(instructions):
            yield Prompt(prompt.prompt, {"instructions": known})


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
