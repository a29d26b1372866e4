"""Load what PPO reads: prompts that fit, and the pretraining text in blocks."""

import math
from collections.abc import Sequence

from accelerate import Accelerator

from rlhf.inputs.chat import Chat
from rlhf.inputs.files import read_records
from rlhf.inputs.fitting import FittedPrompt, fit_prompts
from rlhf.inputs.packing import PromptTree, text_tree
from rlhf.inputs.records import Prompt, Text
from rlhf.inputs.shuffling import ShuffledBatches
from rlhf.inputs.streams import torch_stream
from stages.ppo.config import Config


def inputs_of(config: Config) -> dict[str, str]:
    """Map the name of each input of the run to its path."""
    inputs = {
        "policy": config.policy.path,
        "prompts": config.prompts,
        "prompts_held_out": config.prompts_held_out,
        **{f"reward.{name}": path for name, path in config.reward.model_paths.items()},
        "value_model": config.value_model,
        "text": config.ptx.text if config.ptx.coef else None,
    }
    return {name: path for name, path in inputs.items() if path is not None}


def load_prompts(
    path: str, chat: Chat, config: Config, accelerator: Accelerator
) -> list[FittedPrompt[Prompt]]:
    """Load the prompts that fit; print how many lost early turns and how many were dropped.

    Raises:
        ValueError: no prompt fits, or a larger share than rollout.max_dropped does not.
    """
    limit = f"rollout.max_prompt_tokens {config.rollout.max_prompt_tokens}"
    fitted = fit_prompts(read_records(path, Prompt), chat, config.rollout.max_prompt_tokens)
    fitted.check_dropped(limit, config.rollout.max_dropped, "rollout.max_dropped")
    text = fitted.describe(limit)
    if text is not None:
        accelerator.print(f"ppo: {path}: {text}")
    return fitted.kept


def load_held_out(
    chat: Chat, config: Config, accelerator: Accelerator
) -> list[FittedPrompt[Prompt]]:
    """Load the first num_eval_prompts held-out prompts that fit; [] if none are given."""
    if config.prompts_held_out is None:
        return []
    prompts = load_prompts(config.prompts_held_out, chat, config, accelerator)
    return prompts[: config.num_eval_prompts]


def shuffled_text(
    config: Config, chat: Chat, accelerator: Accelerator
) -> ShuffledBatches[PromptTree]:
    """Return the text blocks of each optimizer step in turn, for all processes; [] without ptx.

    Documents are joined and cut to blocks of `ptx.block_tokens` tokens without a template.
    """
    generator = torch_stream(config.seed, "ppo/text")
    if config.ptx.coef == 0:
        return ShuffledBatches([], 0, generator)
    assert config.ptx.text is not None
    blocks = text_blocks([t.text for t in read_records(config.ptx.text, Text)], chat, config)
    num_processes = accelerator.num_processes
    num_blocks = math.ceil(config.text_blocks_per_step / num_processes) * num_processes
    if num_blocks > len(blocks):
        accelerator.print(
            f"ppo: the text has {len(blocks)} blocks, and an optimizer step takes {num_blocks}: "
            f"each {num_blocks / len(blocks):.1f} times"
        )
    return ShuffledBatches(blocks, num_blocks, generator)


def text_blocks(texts: Sequence[str], chat: Chat, config: Config) -> list[PromptTree]:
    """Join documents, each after `ptx.document_start`, and cut them to full blocks.

    Raises:
        ValueError: the text is shorter than one block, or ptx.document_start is no special token.
    """
    length = config.ptx.block_tokens
    try:
        start = chat.document_start(config.ptx.document_start)
    except ValueError as error:
        raise ValueError(f"ptx.document_start: {error}") from error
    ids = []
    for text in texts:
        ids += [start, *chat.bare_text_ids(text)]
    blocks = [ids[i : i + length] for i in range(0, len(ids) - length + 1, length)]
    if not blocks:
        raise ValueError(
            f"{config.ptx.text} holds {len(ids)} tokens, less than one block of ptx.block_tokens "
            f"{length}; give more text or a smaller block"
        )
    return [text_tree(block) for block in blocks]
