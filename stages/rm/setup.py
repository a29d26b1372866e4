"""Read what the stage trains on and measures on, and load the model that it trains."""

from collections.abc import Sequence
from dataclasses import dataclass

from accelerate import Accelerator

from rlhf.inputs.chat import Chat
from rlhf.inputs.files import read_records
from rlhf.inputs.packing import Packer, PromptTree
from rlhf.inputs.records import Demonstration
from rlhf.models.full import checkpoint_activations
from rlhf.models.layout import packer_for
from rlhf.models.limits import check_vocabulary
from rlhf.models.loading import load_scalar
from rlhf.models.one_copy import converted_once
from rlhf.models.scalar import ScalarModel
from rlhf.models.tokenizers import load_chat
from rlhf.rewards.functions import load_function
from rlhf.training import sharding
from rlhf.training.out_of_memory import memory_of
from rlhf.training.step import TrainState, make_train_state
from stages.rm.config import Config
from stages.rm.data import Counts, Example, make_demonstrations, make_examples, read_rankings
from stages.rm.measure import HeldOut


@dataclass(frozen=True)
class Data:
    """Holds what was read, as token ids, and the counts of what was left out."""

    chat: Chat
    train_set: list[Example]
    train_counts: Counts
    held_out: HeldOut
    held_out_counts: Counts
    demonstrations: list[PromptTree]


def load_data(config: Config, accelerator: Accelerator) -> Data:
    """Read rankings and demonstrations; print how many were left out, and why.

    Raises:
        ValueError: a record is bad, or no ranking orders two responses.
        OSError: a file cannot be read.
    """
    gold = None if config.gold is None else load_function(config.gold)(config.gold_path)
    train_rankings, held_out_rankings = read_rankings(config)
    chat = load_chat(config.model)
    train_set, train_counts = make_examples(train_rankings, chat, config, for_training=True)
    held_out, held_out_counts = make_examples(held_out_rankings, chat, config, for_training=False)
    demonstrations = make_demonstrations(
        read_records(config.demonstrations, Demonstration), chat, config
    )
    if accelerator.is_main_process:
        _report_counts(config, train_counts, held_out_counts)
    _refuse_no_pairs(config, train_set, held_out)
    return Data(
        chat, train_set, train_counts, HeldOut.of(held_out, gold), held_out_counts, demonstrations
    )


def make_state(
    config: Config, chat: Chat, num_steps: int, accelerator: Accelerator
) -> tuple[TrainState[ScalarModel], Packer]:
    """Load the model with a new head and make its optimizer; find how the model can be packed."""
    with memory_of("load"), converted_once(accelerator):
        model = load_scalar(config.model, new_head=True, lora=config.lora)
    check_vocabulary(model.classifier, chat, config.model.path)
    if config.gradient_checkpointing:
        checkpoint_activations(model.classifier)
    groups = [(model, config.optim.learning_rate)]
    state = make_train_state(model, groups, config.optim, num_steps, accelerator)
    with sharding.whole_weights(accelerator, state.model), accelerator.autocast():
        packer = packer_for(model.classifier, config.micro_batch_tokens)
    return state, packer


def inputs_of(config: Config) -> dict[str, str]:
    """Map the name of each input of the run to its path."""
    inputs = {"model": config.model.path, "demonstrations": config.demonstrations}
    for name, sources in (
        ("rankings", config.rankings),
        ("held_out_rankings", config.held_out_rankings or []),
    ):
        for number, source in enumerate(sources, start=1):
            inputs[name if len(sources) == 1 else f"{name}_{number}"] = source
    return inputs if config.gold_path is None else {**inputs, "gold": config.gold_path}


def _refuse_no_pairs(
    config: Config, train_set: Sequence[Example], held_out: Sequence[Example]
) -> None:
    for name, examples in (("training", train_set), ("held-out", held_out)):
        if not any(example.ranking.pairs() for example in examples):
            raise ValueError(
                f"no {name} ranking of {', '.join(config.rankings)} orders two responses: all are "
                "tied, unranked, even, equal to each other or too long; a reward model needs "
                "different responses with different ranks, or probabilities other than 0.5"
            )


def _report_counts(config: Config, train_counts: Counts, held_out_counts: Counts) -> None:
    for name, counts in (("training", train_counts), ("held-out", held_out_counts)):
        print(f"rm: {name}: {counts.kept} of {counts.rankings} rankings kept", flush=True)
        for number, what in (
            (counts.without_pairs, "rankings without a pair dropped"),
            (counts.equal_pairs, "pairs of two equal responses left out"),
            (counts.prompts_too_long, f"prompts over {config.max_prompt_tokens} tokens dropped"),
            (counts.prompts_cut, "prompts cut at a turn"),
            (
                counts.responses_too_long,
                f"responses over {config.max_response_tokens} tokens left out",
            ),
        ):
            if number:
                print(f"rm:   {number} {what}", flush=True)
