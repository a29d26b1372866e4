"""Make the weights that all sides start from: one policy folder and one reward model folder."""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from rlhf.inputs.chat import Chat
from rlhf.inputs.packing import PromptTree
from rlhf.models.layout import packer_for
from rlhf.models.loading import load_scalar, new_policy
from rlhf.models.passes import compute_scores
from rlhf.models.saving import save_policy
from rlhf.models.settings import ModelSettings
from rlhf.models.tokenizers import load_chat
from rlhf.rewards.models import REWARD_FILE, GoldenRow, RewardCard
from rlhf.rewards.rendering import rendering_hash
from stages.pretrain.tokenizer import train_tokenizer

SMOLLM2 = "runs/smollm2/base"
"""Folder of real weights, if `make pipeline PRESET=smollm2` has converted them."""

SHAPES: dict[str, dict[str, Any]] = {
    "1M": {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 6},
    "9M": {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 12},
    "35M": {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 16},
    "135M": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30},
    "350M": {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 24},
}
"""Shapes of Llamas; 135M is SmolLM2-135M, and 350M is for GPUs."""
HEADS = {"1M": (3, 1), "9M": (3, 1), "35M": (6, 2), "135M": (9, 3), "350M": (16, 8)}
"""Attention heads: those of the queries, then those of the keys and values."""
VOCAB_SIZES = {"1M": 4096, "9M": 16384, "35M": 32768, "135M": 49152, "350M": 49152}
CONTEXT = 2048


def policy_folder(work_dir: Path, shape: str = "135M", sharpness: float = 1.0) -> Path:
    """Return the folder of SmolLM2-135M if it is there; else make a random Llama of the shape.

    Args:
        sharpness: Factor of a random Llama's logits. With 1 all tokens are about equally likely.
    """
    if shape == "135M" and Path(SMOLLM2, "config.json").exists():
        return Path(SMOLLM2)
    folder = work_dir / (f"policy-{shape}" + (f"-times-{sharpness:g}" if sharpness != 1 else ""))
    if not (folder / "config.json").exists():
        tokenizer = _small_tokenizer()
        torch.manual_seed(0)
        policy = new_policy(architecture(shape), tokenizer)
        # Resizing by the mean would give all new ids one and the same embedding.
        policy.resize_token_embeddings(VOCAB_SIZES[shape], mean_resizing=False)
        nn.init.constant_(policy.model.norm.weight, sharpness)  # the logits are linear in it
        save_policy(policy, tokenizer, folder)
    return folder


def architecture(shape: str) -> dict[str, Any]:
    heads, kv_heads = HEADS[shape]
    return {
        "model_type": "llama",
        **SHAPES[shape],
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": CONTEXT,
        "tie_word_embeddings": True,
    }


def reward_folder(policy: Path, work_dir: Path) -> Path:
    """Make a reward model of the policy's body and a random head, with a card that lets it load."""
    folder = work_dir / f"reward-of-{policy.parent.name}-{policy.name}"
    if (folder / REWARD_FILE).exists():
        return folder
    settings = ModelSettings(path=str(policy))
    chat = load_chat(settings)
    torch.manual_seed(0)
    model = load_scalar(settings, new_head=True)
    model.save(folder, chat.tokenizer)
    prompt, response = "Name three fruits.", "Apples, pears and plums."
    tree = PromptTree(tuple(chat.prompt_ids(prompt)), (tuple(chat.response_ids(response)),))
    scores = compute_scores(model, [tree], packer_for(model.classifier, CONTEXT))
    RewardCard(
        bias=0.0,
        scale=1.0,
        pair_accuracy=1.0,
        interval=(0.9, 1.0),
        golden=(GoldenRow(prompt=prompt, response=response, score=float(scores[0])),),
        template_hash=chat.template_hash,
        rendering_hash=rendering_hash(chat),
    ).save(folder)
    return folder


def _small_tokenizer() -> PreTrainedTokenizerBase:
    tokenizer = train_tokenizer(["Apples, pears and plums."], vocab_size=300)
    Chat(tokenizer)
    return tokenizer
