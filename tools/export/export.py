"""Merge an adapter into its base, or take the policy out of a checkpoint of PPO."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlhf.models.adapters import find_adapter, merge_adapter
from rlhf.models.architectures import hidden_states
from rlhf.models.loading import load_policy, load_scalar
from rlhf.models.saving import save_policy
from rlhf.models.settings import ModelSettings
from rlhf.models.shared_bases import SharedBases
from rlhf.models.tokenizers import load_tokenizer
from rlhf.rewards.models import REWARD_FILE
from rlhf.runs.checkpoint_files import MANIFEST, Manifest, check_files, read_manifest, read_states
from rlhf.runs.folder import MODEL_FILES, folders_released
from rlhf.runs.run import open_run
from rlhf.training.parameters import copy_into
from tools.export.config import Config

Checkpoint = tuple[Manifest, dict[str, dict[str, Any]]]
"""The manifest of a checkpoint, and the states of its parts."""
POLICY = "policy."
"""Prefix of the names of the policy's weights in a checkpoint of PPO."""
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.25}
"""Largest difference of an output between the adapter on its base and the merged weights. bfloat16
rounds the merged weights to 8 bits."""


@folders_released()
def export(config: Config) -> None:
    """Write the full model with its tokenizer, template, reward card and lineage.

    Raises:
        ValueError: The folder holds no adapter and is no checkpoint of PPO, its base has changed,
            the output folder holds another program's files, or the merged weights do not compute
            what the adapter does.
    """
    files = (*MODEL_FILES, REWARD_FILE)
    checkpoint = _read_checkpoint(Path(config.folder))
    run = open_run(config, stage="export", inputs={"folder": config.folder}, files=files)
    if checkpoint is not None:
        run.finish(_export_checkpoint(checkpoint, config, run.dir))
        return
    adapter = find_adapter(config.folder)
    if adapter is None:
        raise ValueError(
            f"{config.folder} holds no adapter (adapter_config.json) and no checkpoint "
            f"({MANIFEST}), so there is nothing to export"
        )
    settings = ModelSettings(
        path=config.folder, dtype=config.dtype, trust_remote_code=config.trust_remote_code
    )
    tokenizer = load_tokenizer(config.folder, trust_remote_code=config.trust_remote_code)
    bases = SharedBases()  # with shared bases, loading does not merge, so both can be compared
    if adapter.has_head:
        scalar = load_scalar(settings, bases=bases)
        difference = _merge(scalar.classifier, config.dtype)
        scalar.save(run.dir, tokenizer)
        if (Path(config.folder) / REWARD_FILE).is_file():
            shutil.copyfile(Path(config.folder) / REWARD_FILE, run.dir / REWARD_FILE)
    else:
        policy = load_policy(settings, bases=bases)
        difference = _merge(policy, config.dtype)
        save_policy(policy, tokenizer, run.dir)
    run.finish({"base": adapter.base, "max_difference": difference})


def _read_checkpoint(folder: Path) -> Checkpoint | None:
    """Return a checkpoint of PPO and its states, or None if the folder is no checkpoint."""
    if not (folder / MANIFEST).is_file():
        return None
    manifest = read_manifest(folder)
    check_files(folder, manifest)
    states = read_states(folder)
    is_ppo = manifest.run["stage"] == "ppo"
    if not is_ppo or "model" not in states or manifest.run["settings"]["lora"]["rank"]:
        raise ValueError(
            f"{folder} is a checkpoint of {manifest.run['stage']} on {manifest.num_processes} "
            "processes; only the whole weights of a PPO policy without an adapter can be exported. "
            "Give the command of the run again, which goes on from there"
        )
    return manifest, states


def _export_checkpoint(checkpoint: Checkpoint, config: Config, output_dir: Path) -> dict[str, Any]:
    """Write the policy as PPO would have written it after the checkpoint's update."""
    manifest, states = checkpoint
    settings = manifest.run["settings"]
    start = ModelSettings(**settings["policy"])
    start = replace(start, trust_remote_code=config.trust_remote_code)
    policy = load_policy(start)
    both = states["model"]
    own = {n.removeprefix(POLICY): w for n, w in both.items() if n.startswith(POLICY)}
    # A run that averages its policy's weights ends with the average.
    copy_into(dict(policy.named_parameters()), states.get("average", own))
    torch.nn.Module.to(policy, dtype=getattr(torch, config.dtype))
    tokenizer = load_tokenizer(start.path, trust_remote_code=config.trust_remote_code)
    save_policy(policy, tokenizer, output_dir)
    print(f"export: wrote the policy as it was after {manifest.step + 1} updates")
    return {"update": manifest.step}


def _merge(model: PreTrainedModel, dtype: str) -> float:
    """Merge the adapter; return the largest difference it makes in an output for a few tokens."""
    before = _outputs(model)
    merge_adapter(model)
    difference = (_outputs(model) - before).abs().max().item()
    if not difference <= TOLERANCE[dtype]:
        raise ValueError(
            f"merged weights differ from the adapter's by {difference:.2g} in an output, more than "
            f"{TOLERANCE[dtype]} ({dtype}); the adapter's weights are too large for this type"
        )
    print(f"export: merged weights differ by at most {difference:.2g} in an output")
    return difference


@torch.no_grad()
def _outputs(model: PreTrainedModel) -> Tensor:
    """Return logits, or scores, after each of eight tokens from all over the vocabulary."""
    embeddings = model.get_input_embeddings()
    assert isinstance(embeddings, torch.nn.Embedding)
    ids = torch.arange(8) * (embeddings.num_embeddings // 8)
    hidden = hidden_states(model, input_ids=ids[None])
    head = model.get_output_embeddings() or model.score
    assert isinstance(head, torch.nn.Module)
    return head(hidden).float()
