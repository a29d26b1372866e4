"""Load what PPO reads: prompts that fit, and the pretraining text in blocks."""

import math
from collections.abc import Sequence

from accelerate import Accelerator

from rlhf.inputs.chat import Chat
from rlhf.inputs.files import read_records
from rlhf.inputs.fitting import fit_prompt
from rlhf.inputs.packing import PromptTree, text_tree
from rlhf.inputs.records import Prompt, Text, name_rows
from rlhf.inputs.shuffling import ShuffledBatches
from rlhf.inputs.streams import torch_stream
from stages.ppo.config import Config
from stages.ppo.rollout import Episode


def inputs_of(config: Config) -> dict[str, str]:
    inputs = {
        "policy": config.policy.path,
        "prompts": config.prompts,
        "prompts_held_out": config.prompts_held_out,
        **{f"reward.{name}": path for name, path in config.reward.model_paths.items()},
        "value_model": config.value_model,
        "text": config.ptx.text if config.ptx.coef else None,
    }
    return {name: path for name, path in inputs.items() if path is not None}


def load_episodes(path: str, chat: Chat, config: Config, accelerator: Accelerator) -> list[Episode]:
    """Load the prompts that fit; print how many lost early turns and how many were dropped.

    Raises:
        ValueError: no prompt fits.
    """
    max_prompt_tokens = config.rollout.max_prompt_tokens
    episodes = []
    dropped = []
    num_cut = 0
    records = read_records(path, Prompt)
    for record in records:
        prompt = fit_prompt(record, chat, max_prompt_tokens)
        if prompt is None:
            dropped.append(record)
        else:
            num_cut += prompt.is_cut
            episodes.append(Episode(record, prompt.ids))
    if not episodes:
        raise ValueError(
            f"{path}: none of {len(records)} prompts fits in rollout.max_prompt_tokens "
            f"{max_prompt_tokens}; raise it, or give shorter prompts"
        )
    if num_cut or dropped:
        accelerator.print(
            f"ppo: of {len(records)} prompts in {path}, {num_cut} lost early turns and "
            f"{len(dropped)} were dropped{name_rows(dropped)} to fit {max_prompt_tokens} tokens"
        )
    return episodes


def load_held_out(chat: Chat, config: Config, accelerator: Accelerator) -> list[Episode]:
    if config.prompts_held_out is None:
        return []
    episodes = load_episodes(config.prompts_held_out, chat, config, accelerator)
    return episodes[: config.num_eval_prompts]


def shuffled_text(
    config: Config, chat: Chat, accelerator: Accelerator
) -> ShuffledBatches[PromptTree]:
    """Give the text blocks of one optimizer step at a time, for all processes; [] without ptx.

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
    """Join documents, each after the tokenizer's BOS (or EOS) token, and cut them to full blocks.

    Raises:
        ValueError: the text is shorter than one block.
    """
    tokenizer, length = chat.tokenizer, config.ptx.block_tokens
    between = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    ids = []
    for text in texts:
        ids += [between, *chat.bare_text_ids(text)]
    blocks = [ids[i : i + length] for i in range(0, len(ids) - length + 1, length)]
    if not blocks:
        raise ValueError(
            f"{config.ptx.text} holds {len(ids)} tokens, less than one block of ptx.block_tokens "
            f"{length}; give more text or a smaller block"
        )
    return [text_tree(block) for block in blocks]
