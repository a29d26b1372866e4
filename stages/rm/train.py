"""Run the rm stage: read rankings, train, save, and measure what was saved."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object
from safetensors import safe_open
from transformers import set_seed

from rlhf.inputs.chat import Chat
from rlhf.inputs.files import read_records
from rlhf.inputs.packing import Packer, PromptTree
from rlhf.inputs.records import Demonstration
from rlhf.models.adapters import HEAD
from rlhf.models.full import checkpoint_activations
from rlhf.models.layout import packer_for
from rlhf.models.limits import check_vocabulary
from rlhf.models.loading import load_scalar
from rlhf.models.passes import compute_scores
from rlhf.models.saving import save_tokenizer, save_weights
from rlhf.models.scalar import ScalarModel
from rlhf.models.settings import ModelSettings
from rlhf.models.tokenizers import load_chat
from rlhf.rewards.functions import load_function
from rlhf.rewards.models import NUM_GOLDEN, REWARD_FILE, GoldenRow, RewardCard, load_reward_model
from rlhf.rewards.rendering import rendering_hash
from rlhf.runs.checkpoints import Checkpoints, ResumeCallback
from rlhf.runs.folder import MODEL_FILES, folders_given_back
from rlhf.runs.run import Run, open_run
from rlhf.runs.stateful import Fields
from rlhf.training import sharding
from rlhf.training.offloading import free_unused
from rlhf.training.out_of_memory import memory_of
from rlhf.training.processes import naming, own_share, start_accelerator
from stages.rm import figures
from stages.rm.config import Config
from stages.rm.data import Counts, Example, make_demonstrations, make_examples, read_rankings
from stages.rm.trainer import AtEpochEnd, RankingTrainer


@folders_given_back()
def train(config: Config) -> None:
    """Train a reward model and write its folder, with the held-out figures in results.json.

    Raises:
        ValueError: the settings, the records or the model cannot be used.
        OSError: a file cannot be read.
    """
    accelerator = start_accelerator()
    files = (*MODEL_FILES, REWARD_FILE)
    run = open_run(config, stage="rm", inputs=_inputs(config), files=files)
    checkpoints = Checkpoints(run, accelerator, config.checkpoint_every)
    gold = _load_gold(config)
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
    judges = [figures.label_preferences(held_out)]
    if gold is not None:
        judges.append(figures.gold_preferences(held_out, gold))

    def held_out_pairs(model: ScalarModel, packer: Packer) -> list[list[figures.Pair]]:
        """Return the pairs of the labels and, where there is one, those of the gold score."""
        scores = _score_all(model, [example.tree for example in held_out], packer, accelerator)
        return [figures.compare(held_out, scores, judge) for judge in judges]

    def measure(model: ScalarModel, packer: Packer, step: int) -> None:
        model.eval()
        run.log(step, _held_out_metrics(config, *held_out_pairs(model, packer)))

    first_loss, num_steps = _fit(config, chat, train_set, run, checkpoints, measure)
    free_unused()  # free the trained model and its optimizer before the saved model is loaded
    model, packer = _load_saved(config, accelerator)
    demonstration_scores = _score_all(model, demonstrations, packer, accelerator)
    model.bias = _mean([score for (score,) in demonstration_scores])
    pairs = held_out_pairs(model, packer)
    results: dict[str, Any] = {
        **_measure(config, train_set, *pairs),
        "first_loss": first_loss,
        "steps": num_steps,
        "train_prompts": len(train_set),
        "bias": model.bias,
        "demonstrations": len(demonstrations),
        "train_counts": train_counts.as_metrics(),
        "held_out_counts": held_out_counts.as_metrics(),
    }
    if accelerator.is_main_process:
        _write_card(config, chat, [*held_out, *train_set], model, packer, results)
    del model  # the folder is loaded again, in the way that every later stage loads it
    if accelerator.is_main_process:
        load_reward_model(
            _saved(config),
            micro_batch_tokens=config.micro_batch_tokens,
            device=accelerator.device,
            policy_chat=chat,
            allow_chance_reward=True,
        )
    accelerator.wait_for_everyone()
    run.log(num_steps, _held_out_metrics(config, *pairs))
    if accelerator.is_main_process:
        _report(results)
    run.finish(results)


def save_scalar(trainer: RankingTrainer, chat: Chat, folder: Path) -> None:
    """Write the trained model, gathered from all processes, and check that the file has its head.

    Raises:
        ValueError: the file holds no head of shape (1, model).
    """
    weights = sharding.whole_state(trainer.accelerator, trainer.model_wrapped, "classifier")
    if trainer.accelerator.is_main_process:
        assert isinstance(trainer.model, ScalarModel)
        save_weights(trainer.model.classifier, folder, weights)
        save_tokenizer(chat.tokenizer, folder)
        check_saved_head(folder, trainer.model.head.in_features)
    trainer.accelerator.wait_for_everyone()


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


def _inputs(config: Config) -> dict[str, str]:
    inputs = {"model": config.model.path, "demonstrations": config.demonstrations}
    for name, sources in (
        ("rankings", config.rankings),
        ("held_out_rankings", config.held_out_rankings or []),
    ):
        for number, source in enumerate(sources, start=1):
            inputs[name if len(sources) == 1 else f"{name}_{number}"] = source
    return inputs if config.gold_path is None else {**inputs, "gold": config.gold_path}


def _load_gold(config: Config) -> Any:
    return None if config.gold is None else load_function(config.gold)(config.gold_path)


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


def _fit(
    config: Config,
    chat: Chat,
    train_set: Sequence[Example],
    run: Run,
    checkpoints: Checkpoints,
    measure: Callable[[ScalarModel, Packer, int], None],
) -> tuple[float, int]:
    """Train and save; return the loss of the first batch and the number of steps.

    Between epochs `measure` is called with the model, its packer and the step.
    """
    set_seed(config.seed)
    with memory_of("load"):
        model = load_scalar(config.model, new_head=True, lora=config.lora)
    check_vocabulary(model.classifier, chat, config.model.path)
    packer = packer_for(model.classifier, config.micro_batch_tokens)
    if config.gradient_checkpointing:
        checkpoint_activations(model.classifier)
    trainer = RankingTrainer(model, train_set, packer, config, run, checkpoints.step or 0)
    parts = {"trainer": Fields(trainer, "first_loss")}
    trainer.add_callback(ResumeCallback(checkpoints, trainer, parts))

    def measure_whole(step: int) -> None:
        with sharding.whole_weights(trainer.accelerator, trainer.model_wrapped):
            measure(model, packer, step)

    trainer.add_callback(AtEpochEnd(measure_whole))
    # Other stages take a folder with a card for a finished reward model.
    (run.dir / REWARD_FILE).unlink(missing_ok=True)
    place = partial(_place, trainer)
    with memory_of("train"), naming(trainer.accelerator, place):
        trainer.train()
    save_scalar(trainer, chat, run.dir)
    return trainer.first_loss, trainer.state.global_step


def _place(trainer: RankingTrainer) -> str:
    return f"phase train of step {trainer.state.global_step}"


def _saved(config: Config) -> ModelSettings:
    """Return how to load the folder for scoring.

    Scoring runs without autocast, and flash attention takes no float32.
    """
    is_flash = config.model.attention == "flash_attention_2"
    return ModelSettings(
        path=config.output_dir,
        dtype=config.model.dtype,
        attention="sdpa" if is_flash else config.model.attention,
        trust_remote_code=config.model.trust_remote_code,
    )


def _load_saved(config: Config, accelerator: Accelerator) -> tuple[ScalarModel, Packer]:
    """Load the saved model, so that all figures describe the files."""
    model = load_scalar(_saved(config), new_head=False)
    model.to(accelerator.device)
    return model, packer_for(model.classifier, config.micro_batch_tokens)


def _score_all(
    model: ScalarModel, trees: Sequence[PromptTree], packer: Packer, accelerator: Accelerator
) -> list[list[float]]:
    """Return the scores of every tree's responses; the processes share the work."""
    shares = own_share(accelerator, list(enumerate(trees)))
    flat = iter(
        compute_scores(model, [tree for _, tree in shares], packer).tolist() if shares else ()
    )
    own = [(number, [next(flat) for _ in tree.responses]) for number, tree in shares]
    return [scores for _, scores in sorted(gather_object(own))]


def _held_out_metrics(
    config: Config, pairs: Sequence[figures.Pair], gold_pairs: Sequence[figures.Pair] | None = None
) -> dict[str, float]:
    metrics = {
        "rm/held_out_accuracy": figures.accuracy(pairs, config.seed).value,
        "rm/held_out_loss": figures.log_loss(pairs),
    }
    if gold_pairs is not None:
        metrics["rm/held_out_accuracy_gold"] = figures.accuracy(gold_pairs, config.seed).value
    return metrics


def _measure(
    config: Config,
    train_set: Sequence[Example],
    pairs: Sequence[figures.Pair],
    gold_pairs: Sequence[figures.Pair] | None = None,
) -> dict[str, Any]:
    """Compute held-out figures against the labels and, where there is one, the gold score."""
    no_scores = [[0.0] * len(example.tree.responses) for example in train_set]
    train_pairs = figures.compare(train_set, no_scores, figures.label_preferences(train_set))
    longer_wins = figures.does_longer_win(train_pairs)
    error, table = figures.calibration(pairs)
    baseline = figures.length_accuracy(pairs, longer_wins=longer_wins)
    results = {
        **figures.figures_of(pairs, config.seed),
        "length_baseline": baseline,
        "length_baseline_labels": baseline,
        "length_direction": "longer wins" if longer_wins else "shorter wins",
        "calibration_error": error,
        "calibration": table,
        "by_source": figures.by_source(pairs, config.seed),
    }
    if gold_pairs is not None:
        share, interval = figures.accuracy(gold_pairs, config.seed)
        gold_baseline = figures.length_accuracy(gold_pairs, longer_wins=longer_wins)
        results |= {
            "pair_accuracy_gold": share,
            "pair_accuracy_gold_interval": list(interval),
            "length_baseline": gold_baseline,
            "length_baseline_gold": gold_baseline,
            "pairs_gold": len(gold_pairs),
        }
    return results


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
