"""What a model cannot read is refused."""

import pytest

from rlhf.inputs.chat import Chat
from rlhf.models.limits import check_context, check_vocabulary
from tests.rlhf.tiny_models import VOCAB, byte_tokenizer, tiny_policy_of


def test_tokenizer_of_another_model_is_refused() -> None:
    tokenizer = byte_tokenizer("<eos>", "<pad>", "<a>", "<b>", eos_token="<eos>", pad_token="<pad>")
    model = tiny_policy_of("llama")
    with pytest.raises(ValueError, match=f"has 260 tokens, the model at runs/base embeds {VOCAB}"):
        check_vocabulary(model, Chat(tokenizer), "runs/base")
    check_vocabulary(tiny_policy_of("llama", vocab_size=260), Chat(tokenizer), "runs/base")


def test_limits_beyond_the_context_are_refused() -> None:
    model = tiny_policy_of("gpt2")
    check_context(model, "runs/base", {"max_prompt_tokens": 40, "max_new_tokens": 24})
    with pytest.raises(ValueError, match=r"max_prompt_tokens 41 \+ max_new_tokens 24.*64 tokens"):
        check_context(model, "runs/base", {"max_prompt_tokens": 41, "max_new_tokens": 24})
