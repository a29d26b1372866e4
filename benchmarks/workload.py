"""Define the work of both sides of a comparison: the same prompts and responses."""

import dataclasses
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

Kind = Literal["rm", "ppo"]
DType = Literal["float32", "bfloat16"]

FIRST_ID = 100
"""Smallest id to draw. Ids below it may be special tokens."""
LEARNING_RATE = 1e-6
TEXT_BLOCK_TOKENS = 128


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Describes one row of the table: what a sample is, and the folders that it starts from."""

    name: str
    kind: Kind
    policy: str
    """Folder of a causal LM with its tokenizer."""
    reward_model: str
    """Folder of a sequence classifier with the same tokenizer, and a reward.json for our side."""
    prompts: list[list[int]]
    """Token ids."""
    responses: list[list[list[int]]] = dataclasses.field(default_factory=list)
    """RM: the K responses of each prompt, the best first. An epoch over them is a sample."""
    new_tokens: int = 0
    """PPO: most tokens of a response. An update on all prompts is a sample."""
    end_positions: list[int] | None = None
    """PPO: a response has its end token at the first of these positions after its prompt, whose
    first token is at position 0. None means that no response ends before `new_tokens`."""
    text_blocks: int = 0
    """PPO, ours only: blocks of text of the ptx term in an update."""
    dtype: DType = "float32"
    """float32, or bfloat16 autocast over float32 weights."""
    micro_batch: int = 1
    """Sequences (PPO) or pairs (RM) in a pass of TRL."""
    micro_batch_tokens: int = 4096
    """Tokens in our pass."""

    @property
    def num_pairs(self) -> int:
        return sum(len(list(combinations(responses, 2))) for responses in self.responses)

    @property
    def response_lengths(self) -> list[int]:
        """PPO: number of tokens of each prompt's response, its end token included."""
        return [response_length(self, len(prompt)) for prompt in self.prompts]

    @property
    def num_tokens(self) -> int:
        """Number of tokens of the data; every prompt, response and block of text counts once."""
        prompts = sum(map(len, self.prompts)) + TEXT_BLOCK_TOKENS * self.text_blocks
        if self.kind == "ppo":
            return prompts + sum(self.response_lengths)
        return prompts + sum(len(one) for responses in self.responses for one in responses)

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Workload":
        return cls(**json.loads(text))


def rm_data(
    *, num_prompts: int, k: int, prompt_tokens: int, response_tokens: int, vocab_size: int
) -> tuple[list[list[int]], list[list[list[int]]]]:
    """Draw prompts, and K responses to each."""
    draw = random.Random(0)
    prompts = [_ids(draw, prompt_tokens, vocab_size) for _ in range(num_prompts)]
    responses = [
        [_ids(draw, response_tokens, vocab_size) for _ in range(k)] for _ in range(num_prompts)
    ]
    return prompts, responses


def text_blocks(count: int, vocab_size: int) -> list[list[int]]:
    draw = random.Random(2)
    return [_ids(draw, TEXT_BLOCK_TOKENS, vocab_size) for _ in range(count)]


def ppo_prompts(*, lengths: Sequence[int], vocab_size: int) -> list[list[int]]:
    draw = random.Random(1)
    return [_ids(draw, length, vocab_size) for length in lengths]


def spread_lengths(count: int, shortest: int, longest: int) -> list[int]:
    """Return `count` whole numbers from `shortest` to `longest` in equal steps."""
    if count == 1:
        return [longest]
    step = (longest - shortest) / (count - 1)
    return [round(shortest + i * step) for i in range(count)]


def every(distance: int, longest_prompt: int) -> list[int]:
    """Return end positions that are `distance` apart.

    Prompts of all lengths then get responses of 1 to `distance` tokens, as many short as long.
    """
    return list(range(distance, longest_prompt + 2 * distance, distance))


def response_length(work: Workload, prompt_tokens: int) -> int:
    """Return the tokens of the response to a prompt of this length, its end token included."""
    if work.end_positions is None:
        return work.new_tokens
    end = min(position for position in work.end_positions if position >= prompt_tokens)
    return min(end - prompt_tokens + 1, work.new_tokens)


def pairs_of(work: Workload) -> Iterator[tuple[list[int], list[int]]]:
    """Yield all pairs of all prompts as (prompt and better response, prompt and worse response)."""
    for prompt, responses in zip(work.prompts, work.responses, strict=True):
        for better, worse in combinations(responses, 2):
            yield prompt + better, prompt + worse


def _ids(draw: random.Random, count: int, vocab_size: int) -> list[int]:
    return [draw.randrange(FIRST_ID, vocab_size) for _ in range(count)]
