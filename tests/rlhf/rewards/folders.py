"""Saves model folders for the tests of rewards."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from rlhf.inputs.chat import Chat
from rlhf.inputs.packing import PromptTree
from rlhf.inputs.records import PromptLike
from rlhf.models.layout import packer_for
from rlhf.models.loading import load_scalar, new_policy
from rlhf.models.passes import compute_scores
from rlhf.models.saving import save_policy
from rlhf.models.settings import ModelSettings
from rlhf.models.tokenizers import load_tokenizer
from rlhf.rewards.models import GoldenRow, RewardCard
from rlhf.rewards.rendering import rendering_hash
from tests.rlhf.tiny_models import byte_tokenizer

PROMPTS: list[PromptLike] = ["one", "one", "two", [{"role": "user", "content": "three"}]]
RESPONSES = ["yes", "no, rather long", "", "perhaps"]

ARCHITECTURES = {
    "llama": {
        "model_type": "llama",
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
    },
    "gpt2": {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 96},
}


def base_tokenizer() -> PreTrainedTokenizerBase:
    return byte_tokenizer("<end>", "<pad>", eos_token="<end>", pad_token="<pad>")


def merging_tokenizer() -> PreTrainedTokenizerBase:
    """Make a byte-level tokenizer with merges: another vocabulary, and other token boundaries."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|e|>", "<|p|>"], initial_alphabet=alphabet
    )
    tokenizer.train_from_iterator(["User: no, rather long Assistant: perhaps yes one two"], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|e|>", pad_token="<|p|>")


def save_base(folder: Path, architecture: str, tokenizer: PreTrainedTokenizerBase) -> Path:
    """Save a random policy, drawn from torch's generator."""
    Chat(tokenizer)
    save_policy(new_policy(ARCHITECTURES[architecture], tokenizer), tokenizer, folder)
    return folder


def save_reward_model(
    folder: Path, base: Path, *, seed: int, bias: float, scale: float, dtype: Any = "float32"
) -> Path:
    """Save a reward model with a new head on a policy's body, as the rm stage would."""
    torch.manual_seed(seed)
    model = load_scalar(ModelSettings(path=str(base), dtype=dtype), new_head=True)
    model.bias, model.scale = bias, scale
    chat = Chat(load_tokenizer(str(base)))
    trees = [
        PromptTree(tuple(chat.prompt_ids(prompt)), (tuple(chat.response_ids(response)),))
        for prompt, response in zip(PROMPTS, RESPONSES, strict=True)
    ]
    scores = compute_scores(model, trees, packer_for(model.classifier, 512)).tolist()
    rows = zip(PROMPTS, RESPONSES, scores, strict=True)
    model.save(folder, chat.tokenizer)
    RewardCard(
        bias=bias,
        scale=scale,
        pair_accuracy=0.8,
        interval=(0.7, 0.9),
        golden=tuple(GoldenRow(prompt=p, response=r, score=s) for p, r, s in rows),
        template_hash=chat.template_hash,
        rendering_hash=rendering_hash(chat),
        dtype=dtype,
    ).save(folder)
    return folder
