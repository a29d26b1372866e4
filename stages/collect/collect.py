"""Run the collect stage from start to end."""

from collections.abc import Sequence
from pathlib import Path

from rlhf.generation.answers import Answer
from rlhf.inputs.files import read_records, write_records
from rlhf.inputs.records import Prompt, Ranking
from rlhf.models.limits import check_context, check_vocabulary
from rlhf.models.loading import load_policy
from rlhf.models.tokenizers import load_chat
from rlhf.runs.folder import folders_released
from rlhf.runs.run import Run, open_run
from rlhf.training.processes import start_accelerator
from stages.collect.config import Config
from stages.collect.labelers import PARTIAL_RANKINGS_FILE, Labeler, load_labelers, rank_each
from stages.collect.report import agreement, describe_rankings, describe_samples, lines_of
from stages.collect.sample import Question, make_questions, sample_responses

RANKINGS_FILE = "rankings.jsonl"
OVERLAP_FILE = "overlap.jsonl"
FILES = (RANKINGS_FILE, OVERLAP_FILE, PARTIAL_RANKINGS_FILE)


@folders_released()
def collect(config: Config) -> None:
    """Sample K responses a prompt, have them ranked, and write rankings and a report.

    Equal responses to a prompt are ranked once. A prompt whose samples are all equal is left out.
    results.json counts both. The samples depend on the number of processes. After a labeler has
    failed, the same command samples again and asks only for the rankings that are missing.
    """
    inputs = {
        "model": config.model.path,
        "prompts": config.prompts,
        "labelers": config.labelers_path,
    }
    accelerator = start_accelerator()
    run = open_run(config, stage="collect", inputs=inputs, files=FILES)
    labelers = load_labelers(config)
    chat = load_chat(config.model)
    prompts = read_records(config.prompts, Prompt, limit=config.num_prompts)
    questions = make_questions(prompts, chat, config)
    policy = load_policy(config.model)
    check_vocabulary(policy, chat, config.model.path)
    limits = {name: getattr(config, name) for name in ("max_prompt_tokens", "max_new_tokens")}
    check_context(policy, config.model.path, limits)
    answers = sample_responses(policy.to(accelerator.device), questions, chat, config, accelerator)
    if not accelerator.is_main_process:
        return
    distinct = [distinct_texts(group) for group in answers]
    kept = [i for i, texts in enumerate(distinct) if len(texts) > 1]
    if not kept:
        raise ValueError(
            f"all samples of each of the {len(questions)} prompts are equal, so there is nothing "
            f"to compare; raise temperature {config.temperature}"
        )
    ranked = _rank([questions[i] for i in kept], [distinct[i] for i in kept], labelers, config, run)
    rankings = [first for first, *_ in ranked]
    overlap = [(first, second) for first, *seconds in ranked for second in seconds]
    results = {
        **agreement(overlap, config.seed),
        **describe_rankings(rankings),
        **describe_samples(answers),
        "num_prompts": len(prompts),
        "num_prompts_dropped": len(prompts) - len(questions),
        "num_prompts_without_choice": len(questions) - len(kept),
        "num_duplicates": sum(map(len, answers)) - sum(map(len, distinct)),
    }
    _write(run, rankings, [second for _, second in overlap])
    for line in lines_of(results):
        print(f"collect: {line}")
    run.finish(results)


def _rank(
    questions: Sequence[Question],
    responses: Sequence[Sequence[str]],
    labelers: Sequence[Labeler],
    config: Config,
    run: Run,
) -> list[list[Ranking]]:
    """Collect the rankings of `rank_each`, starting from those that an earlier run left.

    If a labeler fails, the rankings so far are written, since a labeler's time is expensive. Ctrl-C
    counts as a failure too, because it may be used to stop a labeler that hangs.
    """
    so_far = Path(config.output_dir) / PARTIAL_RANKINGS_FILE
    goes_on = so_far.exists() and not run.replaces_another
    before = read_records(so_far, Ranking) if goes_on else []
    if before:
        print(f"collect: goes on from {len(before)} rankings in {so_far}")
    ranked: list[list[Ranking]] = []
    try:
        for one in rank_each(questions, responses, labelers, config, before):
            ranked.append(one)
    except BaseException:
        if ranked:
            write_records(
                run.dir / PARTIAL_RANKINGS_FILE, [one for of_prompt in ranked for one in of_prompt]
            )
            print(
                f"collect: {len(ranked)} prompts were ranked, see {so_far}; the same command asks "
                "for the others"
            )
        raise
    return ranked


def distinct_texts(answers: Sequence[Answer]) -> list[str]:
    """Return the different texts among answers, in the order in which they first appear."""
    return list(dict.fromkeys(answer.text for answer in answers))


def _write(run: Run, rankings: Sequence[Ranking], second_rankings: Sequence[Ranking]) -> None:
    folder: Path = run.dir
    for name in (OVERLAP_FILE, PARTIAL_RANKINGS_FILE):
        (folder / name).unlink(missing_ok=True)
    write_records(folder / RANKINGS_FILE, rankings)
    if second_rankings:
        write_records(folder / OVERLAP_FILE, second_rankings)
