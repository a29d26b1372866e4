"""What processes hold of models whose files are of another type, converted once or in each."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from rlhf.inputs.packing import Packer, PromptTree
from rlhf.models.loading import load_policy, load_scalar
from rlhf.models.one_copy import converted_once
from rlhf.models.saving import save_policy
from rlhf.models.settings import LoraSettings, ModelSettings
from rlhf.training import sharding
from rlhf.training.processes import start_accelerator
from rlhf.training.step import Step, make_train_state
from stages.ppo.learner import PolicyAndValue
from tests.distributed.chain import LORA, OPTIM
from tests.rlhf.tiny_models import byte_tokenizer, tiny_policy_of

SETTINGS = {"weights": LoraSettings(), "adapters": LORA}
"""What is trained. The embeddings are tied."""
TREE = PromptTree((3, 4, 5), ((6, 7, 8), (9, 10)))


def converted_models(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Map each of SETTINGS to what each process saw of models in float32 from bfloat16 files.

    "loaded" has the inodes of the converted files whose pages the process holds after loading, and
    "split" those after FSDP2 has split the models. "each" has the first if each process converts
    them. "different" names shards of weights and gradients that differ between the two ways.
    """
    accelerator = start_accelerator()
    if accelerator.is_main_process:
        tokenizer = byte_tokenizer("<s>", "</s>", "<pad>", eos_token="</s>", pad_token="<pad>")
        policy = tiny_policy_of("llama", vocab_size=len(tokenizer), tie_word_embeddings=True)
        save_policy(policy.bfloat16(), tokenizer, folder)
    accelerator.wait_for_everyone()
    return {
        kind: gather_object([_seen_of(accelerator, folder, lora)])
        for kind, lora in SETTINGS.items()
    }


def _seen_of(accelerator: Accelerator, folder: Path, lora: LoraSettings) -> dict[str, Any]:
    in_each, each, _ = _step(accelerator, folder, lora, is_once=False)
    once, loaded, split = _step(accelerator, folder, lora, is_once=True)
    assert in_each.keys() == once.keys()
    different = [name for name in once if not torch.equal(once[name], in_each[name])]
    return {"each": each, "loaded": loaded, "split": split, "different": different}


def _step(
    accelerator: Accelerator, folder: Path, lora: LoraSettings, *, is_once: bool
) -> tuple[dict[str, Tensor], list[int], list[int]]:
    """Load two models, split them and take a step on a row; return shards and inodes."""
    torch.manual_seed(0)
    settings = ModelSettings(path=str(folder))
    with converted_once(accelerator) if is_once else nullcontext():
        policy = load_policy(settings, lora)
        value_model = load_scalar(settings, new_head=True, lora=lora)
    loaded = _converted_files()
    both = PolicyAndValue(policy, value_model)
    groups = [(policy, 1e-3), (value_model, 1e-3)]
    state = make_train_state(both, groups, OPTIM, 10, accelerator)
    split = _converted_files()
    step = Step(state)
    for row in step.rows(Packer(40).rows([TREE])):
        logprobs, values = state.model(row)
        step.add(values.sum() - logprobs.sum())
    named = dict(both.named_parameters())
    gradients = sharding.local_gradients(named.values())
    shards = {
        f"gradient of {name}": one.clone() for name, one in zip(named, gradients, strict=True)
    }
    assert all(bool(one.any()) for name, one in shards.items() if "norm" in name) or lora.rank
    step.take()
    weights = sharding.local_weights(named.values())
    return (
        shards | {name: one.clone() for name, one in zip(named, weights, strict=True)},
        loaded,
        split,
    )


def _converted_files() -> list[int]:
    """Return the inodes of the converted files that this process maps."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return sorted({int(line.split()[4]) for line in lines if "/memfd:weights" in line})
