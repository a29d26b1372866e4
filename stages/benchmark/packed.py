"""Answer the requests of lm-evaluation-harness with packed passes and our own sampling.

Requests that share a context become one prompt tree: the context is read once, and each choice is
a branch of it. The unembedding runs on the tokens of the choices only. The results equal those of
the harness's own HFLM; tests/stages/test_benchmark_harness.py compares both.
"""

import json
from collections.abc import Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from transformers import PreTrainedModel

from rlhf.generation.engines import engine_of
from rlhf.generation.interface import Decoding
from rlhf.generation.settings import GenerationSettings
from rlhf.inputs.chat import Chat
from rlhf.inputs.packing import PromptTree, predicting_rows
from rlhf.inputs.records import show
from rlhf.inputs.template import render
from rlhf.models.heads import response_likelihoods
from rlhf.models.layout import packer_for
from rlhf.runs.stopwatch import progress_shown

DEFAULT_NEW_TOKENS = 256
"""Most tokens of an answer if its task does not say; the same number as in HFLM."""
DEFAULT_CONTEXT = 2048
"""Context of a model whose config declares none; the same number as in HFLM."""
UNDERSTOOD = {"until", "max_gen_toks", "do_sample", "temperature"}
"""Generation settings of a task that our engine follows."""

TokenRequest = tuple[tuple[str, str] | None, list[int], list[int]]
"""Texts of context and continuation (None in rolling windows), and the ids of both."""


class PackedLM(TemplateLM):
    """Gives log-likelihoods and samples of one policy to lm-evaluation-harness.

    Samples are drawn by torch's global generator, as HFLM draws them.
    """

    def __init__(
        self,
        policy: PreTrainedModel,
        chat: Chat,
        *,
        micro_batch_tokens: int,
        generation: GenerationSettings,
    ) -> None:
        """Prepare a policy that is on its device already."""
        super().__init__()
        self.policy = policy
        self.tokenizer: Any = chat.tokenizer
        self._chat = chat
        self._device = policy.device
        self._packer = packer_for(policy, micro_batch_tokens)
        self._generation = generation
        context = getattr(policy.config.get_text_config(), "max_position_embeddings", None)
        self._max_tokens: int = context or DEFAULT_CONTEXT

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """The token that stands for an empty context."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else int(bos)

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path)

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Return the ids of a text, with special tokens unless it begins with one already."""
        if add_special_tokens is None:
            add_special_tokens = not string.startswith(self._shown(self.prefix_token_id))
        ids = self.tokenizer.encode(string, add_special_tokens=add_special_tokens)
        assert isinstance(ids, list)
        return ids

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Render turns as text. Without a generation prompt, the last turn stays open."""
        if add_generation_prompt:
            return render(self.tokenizer, chat_history, add_generation_prompt=True)
        return str(
            self.tokenizer.apply_chat_template(
                chat_history, tokenize=False, continue_final_message=True
            )
        )

    def _loglikelihood_tokens(
        self, requests: Sequence[TokenRequest], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """Return (log-likelihood in nats, whether greedy decoding gives it) for each request.

        A context that is too long loses its first tokens.

        Raises:
            ValueError: A continuation has no tokens, or more than the model can read.
        """
        by_context: dict[tuple[int, ...], list[int]] = {}
        continuations: list[tuple[int, ...]] = []
        for number, request in enumerate(requests):
            context, continuation = self._fit(request)
            by_context.setdefault(context, []).append(number)
            continuations.append(continuation)
        trees = [
            PromptTree(context, tuple(continuations[number] for number in numbers))
            for context, numbers in by_context.items()
        ]
        order = [number for numbers in by_context.values() for number in numbers]
        answers = [(0.0, True)] * len(requests)
        with progress_shown("benchmark: choices", len(requests), not disable_tqdm) as progress:
            for row in predicting_rows(self._packer, trees):
                row = row.to(self._device)
                likelihoods = response_likelihoods(self.policy, row)
                totals = row.unpack(likelihoods.logprobs).double().sum(1)
                misses = row.unpack(~likelihoods.is_greedy).any(1)
                for response, total, misses_one in zip(
                    row.response_index.tolist(), totals.tolist(), misses.tolist(), strict=True
                ):
                    answers[order[response]] = (total, not misses_one)
                progress(len(row.response_index))
        return answers

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Return the log-likelihood of each whole text in nats.

        A text that is longer than the model's context is read in windows, each of which predicts
        only new tokens.
        """
        windows: list[TokenRequest] = []
        owners: list[int] = []
        for number, request in enumerate(requests):
            for pair in get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self._max_tokens,
                context_len=1,
            ):
                context, continuation = make_disjoint_window(pair)
                windows.append((None, context, continuation))
                owners.append(number)
        totals = [0.0] * len(requests)
        likelihoods = self._loglikelihood_tokens(windows, disable_tqdm=disable_tqdm)
        for owner, (total, _) in zip(owners, likelihoods, strict=True):
            totals[owner] += total
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return the answer to each request, cut before the first stop text.

        Raises:
            ValueError: A task asks for a way of sampling that our engine does not have.
        """
        by_settings: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            key = json.dumps(request.args[1], sort_keys=True)
            by_settings.setdefault(key, []).append(number)
        answers = [""] * len(requests)
        with (
            engine_of(self.policy, self._generation) as engine,
            progress_shown("benchmark: answers", len(requests), not disable_tqdm) as progress,
        ):
            for key, numbers in by_settings.items():
                stops, decoding = self._decoding(json.loads(key))
                prompts = [
                    self._prompt_ids(requests[number].args[0], decoding) for number in numbers
                ]
                samples = engine.generate(prompts, decoding, progress=progress)
                for number, ids in zip(numbers, samples.responses, strict=True):
                    text = self.tokenizer.decode(ids, skip_special_tokens=True)
                    answers[number] = _before_stops(text, stops)
        return answers

    def _fit(self, request: TokenRequest) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return context and continuation, cut to one token more than the model reads.

        The last token is only predicted, so it needs no position."""
        texts, context, continuation = request
        if not continuation or len(continuation) > self._max_tokens:
            raise ValueError(
                f"a choice has {len(continuation)} tokens, and the policy can answer with 1 to "
                f"{self._max_tokens}: {show(texts)}; correct the task's choices"
            )
        room = self._max_tokens + 1 - len(continuation)
        return tuple(context[-room:]), tuple(continuation)

    def _prompt_ids(self, text: str, decoding: Decoding) -> list[int]:
        room = self._max_tokens - decoding.max_new_tokens
        if room < 1:
            raise ValueError(
                f"an answer may have {decoding.max_new_tokens} tokens (max_gen_toks), and the "
                f"policy reads {self._max_tokens} in all; lower it in the task file"
            )
        return self.tok_encode(text)[-room:]

    def _decoding(self, settings: dict[str, Any]) -> tuple[list[str], Decoding]:
        """Return stop texts and how to decode, from a task's generation settings."""
        known: dict[str, Any] = dict(normalize_gen_kwargs(settings, DEFAULT_NEW_TOKENS))
        other = sorted(set(known) - UNDERSTOOD)
        if other:
            raise ValueError(
                f"a task asks to sample with {', '.join(other)}, and our engine knows "
                f"{', '.join(sorted(UNDERSTOOD))}; drop it from the task file, or set engine: hflm"
            )
        stops = [stop for stop in [*known["until"], self._shown(self.eot_token_id)] if stop]
        most_bytes = max(len(stop.encode()) for stop in stops)

        def is_over(response: Sequence[int]) -> bool:
            # A token adds at least a byte, so a stop text that ends here began in these tokens.
            end = self.tokenizer.decode(list(response[-most_bytes:]))
            return any(stop in end for stop in stops)

        return stops, Decoding(
            end_id=self._chat.end_id,
            other_ends=self._chat.other_ends,
            max_new_tokens=known["max_gen_toks"],
            temperature=known.get("temperature", 0.0) if known["do_sample"] else 0.0,
            is_over=is_over,
        )

    def _shown(self, token: int) -> str:
        return str(self.tokenizer.decode([token]))


def _before_stops(text: str, stops: Sequence[str]) -> str:
    for stop in stops:
        text = text.split(stop)[0]
    return text
