"""Measures whether a model still continues plain text with facts from pretraining.

Fact recall is the alignment tax in one number. Each probe is a prompt record whose `meta` holds two
texts. The model gets `text` as it is, without a chat template; the continuation must start with
`answer`.
"""

from collections.abc import Sequence

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf.generation.engines import generate
from rlhf.generation.interface import Decoding
from rlhf.generation.settings import GenerationSettings
from rlhf.inputs.records import Prompt, show


def fact_recall(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    probes: Sequence[Prompt],
    *,
    batch_size: int = 64,
) -> float:
    """Return the share (0 to 1) of probes whose greedy continuation starts with the answer.

    The answer counts only as a whole word: `oak` is not recalled by `oaken`.

    Raises:
        ValueError: There is no probe, or one without `text` or `answer` in its meta.
    """
    if not probes:
        raise ValueError("there are no fact probes; give at least one prompt with text and answer")
    for number, probe in enumerate(probes, start=1):
        if not all(isinstance(probe.meta.get(name), str) for name in ("text", "answer")):
            raise ValueError(
                f"{probe.place or f'fact probe {number}'}: field 'meta': found {show(probe.meta)}; "
                "a fact probe needs the strings text and answer in it"
            )
    continuations = _continue_greedily(model, tokenizer, probes, batch_size)
    recalled = [
        starts_with_answer(continuation, probe.meta["answer"])
        for continuation, probe in zip(continuations, probes, strict=True)
    ]
    return sum(recalled) / len(recalled)


def starts_with_answer(continuation: str, answer: str) -> bool:
    """Return whether a continuation begins with the answer as whole words, after white space."""
    continuation, answer = continuation.lstrip(), answer.strip()
    rest = continuation[len(answer) :]
    return continuation.startswith(answer) and not rest[:1].isalnum()


def _continue_greedily(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    probes: Sequence[Prompt],
    batch_size: int,
) -> list[str]:
    answers = [tokenizer(probe.meta["answer"], add_special_tokens=False) for probe in probes]
    samples = generate(
        model,
        [tokenizer(probe.meta["text"]).input_ids for probe in probes],
        GenerationSettings(batch_size=batch_size),
        Decoding(
            end_id=tokenizer.eos_token_id,
            # Two tokens more, to see whether the answer's last word ends there.
            max_new_tokens=max(len(answer.input_ids) for answer in answers) + 2,
            temperature=0.0,
        ),
    )
    return [str(tokenizer.decode(ids, skip_special_tokens=True)) for ids in samples.responses]
