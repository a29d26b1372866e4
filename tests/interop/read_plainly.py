"""Prints what a plain from_pretrained reads in folders as JSON, with any version of transformers.

    python tests/interop/read_plainly.py policy=FOLDER reward_model=FOLDER ...

It imports nothing of the project, as other readers of these folders do not.
"""

import json
import sys
from typing import Any

import torch
import transformers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

TEXT = "The quick brown fox jumps over the lazy dog, and 12 more words come after it: naïve 東京."
CHAT = [{"role": "user", "content": "q1"}]
NEW_TOKENS = 12

READERS = {"policy": AutoModelForCausalLM, "reward_model": AutoModelForSequenceClassification}


def main() -> None:
    found: dict[str, Any] = {"version": transformers.__version__}
    for argument in sys.argv[1:]:
        kind, folder = argument.split("=", 1)
        try:
            found[folder] = read(kind, folder)
        except Exception as error:  # printed beside the others
            found[folder] = {"error": f"{type(error).__name__}: {error}"}
    json.dump(found, sys.stdout)


@torch.no_grad()
def read(kind: str, folder: str) -> dict[str, Any]:
    """Return the ids of a text and of a rendered chat, and the model's outputs for both."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    options = {"num_labels": 1} if kind == "reward_model" else {}
    model = READERS[kind].from_pretrained(folder, **options).float().eval()
    prompt = tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    prompt_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    text_ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    ids = torch.tensor([[token % model.config.vocab_size for token in prompt_ids + text_ids]])
    logits = model(input_ids=ids).logits[0]
    found = {
        "prompt_ids": prompt_ids,
        "text_ids": text_ids,
        "text": tokenizer.decode(text_ids),
        "end": tokenizer.eos_token_id,
        "special": sorted(tokenizer.all_special_ids),
    }
    if kind == "reward_model":
        return {**found, "logits": logits.tolist()}
    nats = torch.nn.functional.cross_entropy(logits[:-1], ids[0, 1:])
    return {
        **found,
        "logits": logits[-1].tolist(),
        "loss": float(nats),
        "greedy": greedy(model, ids),
    }


def greedy(model: Any, ids: torch.Tensor) -> list[int]:
    options = {"do_sample": False, "max_new_tokens": NEW_TOKENS}
    out = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    return out[0, ids.shape[1] :].tolist()


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    main()
