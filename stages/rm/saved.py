"""Save the trained model, then measure the folder as later stages load it, and write its card."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from safetensors import safe_open

from rlhf.inputs.chat import Chat
from rlhf.inputs.packing import Packer, PromptTree
from rlhf.models.adapters import HEAD
from rlhf.models.layout import packer_for
from rlhf.models.loading import load_scalar
from rlhf.models.passes import compute_scores
from rlhf.models.saving import save_tokenizer, save_weights
from rlhf.models.scalar import ScalarModel
from rlhf.models.settings import ModelSettings
from rlhf.rewards.models import NUM_GOLDEN, GoldenRow, RewardCard, load_reward_model
from rlhf.rewards.rendering import rendering_hash
from rlhf.runs.run import Run
from rlhf.training import sharding
from stages.rm.config import Config
from stages.rm.data import Example
from stages.rm.measure import final_metrics, held_out_metrics, score_all
from stages.rm.setup import Data
from stages.rm.update import State


def finish(
    config: Config, data: Data, run: Run, accelerator: Accelerator, training: Mapping[str, float]
) -> None:
    """Measure what was saved, write reward.json beside it, and complete the run.

    All figures describe the files. So the model is loaded from its folder, in the way that every
    later stage loads it.

    Args:
        training: figures of the training itself, for results.json.
    """
    model, packer = _load_saved(config, accelerator)
    demonstration_scores = score_all(model, data.demonstrations, packer, accelerator)
    model.bias = _mean([score for (score,) in demonstration_scores])
    pairs = data.held_out.pairs(model, packer, accelerator)
    results: dict[str, Any] = {
        **final_metrics(config, data.train_set, *pairs),
        **training,
        "train_prompts": len(data.train_set),
        "bias": model.bias,
        "demonstrations": len(data.demonstrations),
        "train_counts": data.train_counts.as_metrics(),
        "held_out_counts": data.held_out_counts.as_metrics(),
    }
    if accelerator.is_main_process:
        examples = [*data.held_out.examples, *data.train_set]
        _write_card(config, data.chat, examples, model, packer, results)
    del model  # before the next is loaded
    if accelerator.is_main_process:
        load_reward_model(  # it refuses a folder that a later stage would refuse
            _saved(config),
            micro_batch_tokens=config.micro_batch_tokens,
            device=accelerator.device,
            policy_chat=data.chat,
            allow_chance_reward=True,
        )
    accelerator.wait_for_everyone()
    run.log(results["steps"], held_out_metrics(config, *pairs))
    if accelerator.is_main_process:
        _report(results)
    run.finish(results)


def save_scalar(state: State, chat: Chat, folder: Path) -> None:
    """Write the trained model, gathered from all processes, and check that the file has its head.

    Raises:
        ValueError: the file holds no head of shape (1, model).
    """
    accelerator, model = state.accelerator, state.module
    weights = sharding.whole_state(accelerator, state.model, "classifier")
    if accelerator.is_main_process:
        save_weights(model.classifier, folder, weights)
        save_tokenizer(chat.tokenizer, folder)
        check_saved_head(folder, model.head.in_features)
    accelerator.wait_for_everyone()


def check_saved_head(folder: Path, width: int) -> None:
    """Raise a ValueError unless the safetensors files of a folder hold a head of (1, width)."""
    shapes = []
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            heads = [name for name in file.keys() if name.endswith(HEAD)]  # noqa: SIM118 (no mapping)
            shapes += [tuple(file.get_slice(name).get_shape()) for name in heads]
    if shapes != [(1, width)]:
        raise ValueError(
            f"{folder} was written without the reward head: {HEAD} has shape "
            f"{shapes or 'none'}, expected (1, {width}); the folder cannot be used"
        )


def _saved(config: Config) -> ModelSettings:
    """Return how to load the folder for scoring.

    Scoring runs without autocast, and flash attention takes no float32.
    """
    is_flash = config.model.attention.startswith("flash")
    return ModelSettings(
        path=config.output_dir,
        dtype=config.model.dtype,
        attention="sdpa" if is_flash else config.model.attention,
        trust_remote_code=config.model.trust_remote_code,
    )


def _load_saved(config: Config, accelerator: Accelerator) -> tuple[ScalarModel, Packer]:
    model = load_scalar(_saved(config), new_head=False)
    model.to(accelerator.device)
    return model, packer_for(model.classifier, config.micro_batch_tokens)


def _write_card(
    config: Config,
    chat: Chat,
    examples: Sequence[Example],
    model: ScalarModel,
    packer: Packer,
    results: dict[str, Any],
) -> None:
    """Write reward.json; its golden rows are the first examples whose prompt was not cut."""
    golden = [example for example in examples if not example.is_cut][:NUM_GOLDEN]
    if not golden:
        raise ValueError(
            f"every prompt is longer than max_prompt_tokens {config.max_prompt_tokens}, so none "
            "can be a golden row of reward.json; raise max_prompt_tokens"
        )
    trees = [PromptTree(example.tree.prompt, example.tree.responses[:1]) for example in golden]
    scores = compute_scores(model, trees, packer).tolist()
    low, high = results["pair_accuracy_interval"]
    RewardCard(
        bias=model.bias,
        scale=model.scale,
        pair_accuracy=results["pair_accuracy"],
        interval=(low, high),
        golden=tuple(
            GoldenRow(
                prompt=example.ranking.prompt, response=example.ranking.responses[0], score=score
            )
            for example, score in zip(golden, scores, strict=True)
        ),
        template_hash=chat.template_hash,
        rendering_hash=rendering_hash(chat),
        dtype=config.model.dtype,
    ).save(config.output_dir)


def _report(results: dict[str, Any]) -> None:
    low, high = results["pair_accuracy_interval"]
    print(
        f"rm: held-out pairs ordered right: {results['pair_accuracy']:.3f} "
        f"({low:.3f} to {high:.3f}) of {results['pairs']}; by length alone "
        f"{results['length_baseline_labels']:.3f}; first loss {results['first_loss']:.3f} (ln 2 is "
        f"0.693), held-out {results['log_loss']:.3f}"
    )
    if "pair_accuracy_gold" in results:
        low, high = results["pair_accuracy_gold_interval"]
        print(
            f"rm: by gold score: {results['pair_accuracy_gold']:.3f} ({low:.3f} to {high:.3f}) of "
            f"{results['pairs_gold']}; by length alone {results['length_baseline_gold']:.3f}"
        )
    if len(results["by_source"]) > 1:
        for source, row in results["by_source"].items():
            low, high = row["pair_accuracy_interval"]
            print(
                f"rm:   {source}: {row['pair_accuracy']:.3f} ({low:.3f} to {high:.3f}) of "
                f"{row['pairs']} pairs"
            )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
