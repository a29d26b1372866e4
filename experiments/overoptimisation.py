"""python -m experiments.overoptimisation

This study compares gold and proxy reward as a policy moves away from SFT (Gao, Schulman and Hilton
2022). It does so with much and with little ranking data, and with the KL penalty off and on. It
also puts best-of-n on the same axis.

For each run folder of `make pipeline`, the study writes to RUN/overoptimisation. It makes a second
reward model from few of the same rankings; both are measured on the same held-out prompts. It makes
four long PPO runs without ptx, whose regular evaluation keeps every response. It takes N samples a
prompt from SFT. The gold score, which no training saw, then marks all these responses.

A score counts standard deviations of SFT's own responses from their mean, so SFT is at 0. The proxy
is the score that PPO was given, with the penalty for a missing end; gold judges the text alone. The
distance is d = sqrt(KL to SFT), so the best-of-n form below is `a d - b KL`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from experiments.shared import (
    COLOURS,
    INK,
    RUNS,
    TABLE,
    read_json,
    read_rows,
    save_figure,
    settings_of,
    style_axes,
    values_cell,
)
from experiments.tables import markdown_table
from rlhf.inputs.files import read_records, write_records
from rlhf.inputs.fitting import fit_prompts
from rlhf.inputs.ranges import Range
from rlhf.inputs.records import Prompt
from rlhf.inputs.streams import python_stream, torch_stream
from rlhf.measuring.statistics import best_of_n, best_of_n_kl
from rlhf.models.layout import packer_for
from rlhf.models.loading import load_policy
from rlhf.models.tokenizers import load_chat
from rlhf.rewards.functions import load_function
from rlhf.rewards.load import load_reward
from rlhf.runs.folder import RESULTS, SAMPLES, folders_released
from rlhf.runs.program import run_stage
from rlhf.runs.run import open_run
from rlhf.runs.settings import FolderSettings
from rlhf.training.processes import start_accelerator
from stages.evaluate.config import Config as EvaluateConfig
from stages.ppo.config import Config as PPOConfig
from stages.ppo.rollout import RolloutWorker
from stages.ppo.train import train as train_ppo
from stages.rm.config import Config as RMConfig
from stages.rm.data import read_rankings
from stages.rm.train import train as train_rm

FOLDER = "overoptimisation"
FULL = "full"
"""Name of the run's own reward model, which was trained on all of its rankings."""
BEST_OF_N = "best-of-n"

RL_FORM = "d (a - b ln d)"
BEST_OF_N_FORM = "d (a - b d)"
FORMS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    RL_FORM: lambda d: np.stack([d, -d * np.log(d)], axis=1),
    BEST_OF_N_FORM: lambda d: np.stack([d, -(d**2)], axis=1),
    "d (a - b d^2)": lambda d: np.stack([d, -(d**3)], axis=1),
    "constant": lambda d: np.ones((len(d), 1)),
}
"""Maps each form of gold as a function of the distance (points,) to the columns that its
coefficients multiply. The first two are those of Gao et al. for RL and for best-of-n."""
MIN_KL = 0.1
"""Smallest KL of a fitted point, in nats, since the form for RL has an infinite slope at d = 0."""


@dataclass(frozen=True, kw_only=True)
class Config(FolderSettings):
    """Study over-optimisation on the runs of several seeds."""

    runs: list[str] = field(default_factory=lambda: list(RUNS))
    """Run folders of whole pipelines with a gold score, one for each seed."""
    small_prompts: int = 100
    """Rankings to train the second reward model on."""
    small_batch_size: int = 4
    """Prompts in an optimizer step of the second reward model."""
    small_epochs: int = 2
    """Passes of the second reward model over its rankings."""
    kl_coefs: list[float] = field(default_factory=lambda: [0.0, 0.05])
    """Values of ppo.kl_coef. Each is used with both reward models."""
    num_updates: int = 60
    """PPO updates of each run."""
    eval_every: int = 4
    """Updates between two points of a curve."""
    num_prompts: int = 256
    """Held-out prompts for every point, from the start of the file. A prompt has one response, and
    num_samples of them for best-of-n."""
    num_samples: Annotated[int, Range(low=16)] = 64
    """Samples a prompt for best-of-n, which is measured for n = 1, 2, 4, ..."""
    output_dir: str = "runs/overoptimisation"
    """Folder of table.md and results.json."""
    plot: str = "docs/experiments/overoptimisation.png"
    """The PNG to write."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("runs", "kl_coefs"):
            if not getattr(self, name):
                raise ValueError(f"{name} is empty; give at least one")

    @property
    def small(self) -> str:
        """Name of the second reward model."""
        return str(self.small_prompts)


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """Sample from the SFT policy, and score the samples by every proxy."""

    run: str
    """The run folder."""
    reward_models: dict[str, str]
    """Maps the name of each proxy to its folder."""
    num_prompts: int
    """Held-out prompts to use, from the start of the file."""
    num_samples: int
    """Samples for each prompt."""
    output_dir: str
    """Folder of samples.jsonl."""


@dataclass(frozen=True)
class Curve:
    """Holds the points of one way to optimise on one seed, from near to far; arrays are
    (points,)."""

    kl: np.ndarray
    """KL to SFT, in nats a response."""
    gold: np.ndarray
    proxy: np.ndarray
    tokens: np.ndarray
    """Mean length of a response."""

    @property
    def distance(self) -> np.ndarray:
        return np.sqrt(np.maximum(self.kl, 0.0))  # an estimated KL near 0 can be negative


@dataclass(frozen=True)
class Fit:
    """Holds a form fitted to the half of the points with the lower KL."""

    coefficients: tuple[float, ...]
    """a and b, or the value of the constant form."""
    error: float
    """Root mean squared error on the other half."""


Key = tuple[str, str]
"""Holds the name of the proxy, and the name of what optimises against it."""


@dataclass(frozen=True)
class Standard:
    """Centres and scales scores by the mean and standard deviation of SFT's responses."""

    mean: float
    deviation: float

    @classmethod
    def of(cls, scores: Sequence[float]) -> "Standard":
        return cls(float(np.mean(scores)), float(np.std(scores)))

    def __call__(self, scores: np.ndarray) -> np.ndarray:
        return (scores - self.mean) / self.deviation


@folders_released()
def study(config: Config) -> None:
    """Make the missing runs, mark their responses, fit the forms, write tables and plot."""
    record = open_run(
        config,
        stage=FOLDER,
        inputs={run: run for run in config.runs},
        files=(TABLE,),
        always_runs=True,
    )
    for run in config.runs:
        make_runs(config, run)
    by_run = [read_curves(config, run) for run in config.runs]
    curves = {key: [of_run[key] for of_run in by_run] for key in by_run[0]}
    tables = "\n".join(
        [
            f"Reward models, each of the seeds {', '.join(config.runs)}:\n",
            _reward_model_table(config),
            "Scores in standard deviations of SFT's, KL in nats, of each seed:\n",
            curve_table(curves),
            "Fitted to the low-KL half; a and b of the optimiser's own form, in bold, and the root "
            "mean squared error of each form on the high-KL half:\n",
            fit_table(curves),
        ]
    )
    (record.dir / TABLE).write_text(tables, encoding="utf-8")
    draw(config, curves)
    record.finish(
        {f"{proxy}/{optimiser}": _report(of) for (proxy, optimiser), of in curves.items()}
    )
    print(tables)


def make_runs(config: Config, run: str) -> None:
    """Make the second reward model, the long PPO runs and the samples of SFT."""
    folder = Path(run) / FOLDER
    reward_models = {FULL: f"{run}/rm", config.small: str(folder / f"rm_{config.small}")}
    train_rm(small_reward_model(config, run))
    for name, reward_model in reward_models.items():
        for kl_coef in config.kl_coefs:
            train_ppo(long_ppo(config, run, name, reward_model, kl_coef))
    samples = SampleConfig(
        run=run,
        reward_models=reward_models,
        num_prompts=config.num_prompts,
        num_samples=config.num_samples,
        output_dir=str(folder / BEST_OF_N),
    )
    sample(samples)


def small_reward_model(config: Config, run: str) -> RMConfig:
    """Return the settings of the second reward model, and write its rankings.

    They are drawn from the first reward model's training rankings. Both reward models have the same
    held-out rankings.
    """
    base = settings_of(RMConfig, f"{run}/rm")
    drawn = Path(run) / FOLDER / f"rankings_{config.small}.jsonl"
    held_out = drawn.with_name("rankings_held_out.jsonl")
    if not (drawn.is_file() and held_out.is_file()):
        train_rankings, held_out_rankings = read_rankings(base)
        generator = python_stream(base.seed, "overoptimisation/rankings")
        write_records(drawn, generator.sample(train_rankings, config.small_prompts))
        write_records(held_out, held_out_rankings)
    return replace(
        base,
        rankings=[str(drawn)],
        held_out=None,
        held_out_rankings=[str(held_out)],
        batch_size=config.small_batch_size,
        num_epochs=config.small_epochs,
        output_dir=str(drawn.with_name(f"rm_{config.small}")),
    )


def long_ppo(config: Config, run: str, name: str, reward_model: str, kl_coef: float) -> PPOConfig:
    """Return the settings of RUN/ppo with another reward model, more updates and no averaging."""
    base = settings_of(PPOConfig, f"{run}/ppo")
    return replace(
        base,
        reward=replace(base.reward, model=reward_model),
        ppo=replace(base.ppo, kl_coef=kl_coef),
        num_updates=config.num_updates,
        ema_decay=None,
        eval_every=config.eval_every,
        num_eval_prompts=config.num_prompts,
        num_samples=config.num_prompts,
        output_dir=f"{run}/{FOLDER}/{name}_kl_{kl_coef:g}",
    )


@folders_released()
def sample(config: SampleConfig) -> None:
    """Sample N responses of SFT to each held-out prompt, and score them as PPO does."""
    ppo = settings_of(PPOConfig, f"{config.run}/ppo")
    if ppo.prompts_held_out is None:
        raise ValueError(f"{config.run}/ppo has no prompts_held_out; make it anew with them")
    run = open_run(
        config, stage=BEST_OF_N, inputs={"policy": ppo.policy.path, **config.reward_models}
    )
    device = start_accelerator().device
    chat = load_chat(ppo.policy)
    policy = load_policy(ppo.policy)
    policy.to(device)
    packer = packer_for(policy, ppo.micro_batch_tokens)
    samplers = {
        name: RolloutWorker(
            chat,
            policy,
            load_reward(replace(ppo.reward, model=path), chat, device, ppo.micro_batch_tokens),
            packer,
            ppo,
        )
        for name, path in config.reward_models.items()
    }
    records = read_records(ppo.prompts_held_out, Prompt)
    fitted = fit_prompts(records, chat, ppo.rollout.max_prompt_tokens).kept
    prompts = [one for one in fitted[: config.num_prompts] for _ in range(config.num_samples)]
    sampling = torch_stream(ppo.seed, "overoptimisation/samples")
    answers = samplers[FULL].sample(policy, prompts, sampling)
    scores = {name: one.score(answers).scores.tolist() for name, one in samplers.items()}
    run.samples(
        {
            "prompt": answer.record.prompt,
            "response": answer.text,
            "tokens": len(answer.response_ids),
            "scores": {name: scores[name][i] for name in scores},
        }
        for i, answer in enumerate(answers)
    )
    run.finish({f"score_{name}": float(np.mean(values)) for name, values in scores.items()})


def read_curves(config: Config, run: str) -> dict[Key, Curve]:
    """Read all curves of one run, with its responses marked by gold."""
    folder = Path(run) / FOLDER
    sft = _read_marked(folder / BEST_OF_N, run)
    gold = Standard.of([row["gold"] for row in sft])
    curves: dict[Key, Curve] = {}
    for name in (FULL, config.small):
        proxy = Standard.of([row["scores"][name] for row in sft])
        scored = [row | {"score": row["scores"][name]} for row in sft]
        curve = best_of_n_curve(scored, config.num_samples)
        curves[name, BEST_OF_N] = _standardise(curve, gold, proxy)
        for kl_coef in config.kl_coefs:
            rows = _read_marked(folder / f"{name}_kl_{kl_coef:g}", run)
            curves[name, f"PPO, KL coefficient {kl_coef:g}"] = _standardise(
                ppo_curve(rows), gold, proxy
            )
    return curves


def best_of_n_curve(rows: Sequence[dict[str, Any]], num_samples: int) -> Curve:
    """Compute means over prompts for n = 1, 2, 4, ...

    Each prompt has num_samples neighbouring rows.
    """
    sizes = [2**i for i in range(num_samples.bit_length())]
    prompts = [rows[i : i + num_samples] for i in range(0, len(rows), num_samples)]

    def mean_of_best(key: str) -> np.ndarray:
        columns = [([r["score"] for r in of], [r[key] for r in of]) for of in prompts]
        return np.array([np.mean([best_of_n(*column, n) for column in columns]) for n in sizes])

    kl = np.array([best_of_n_kl(n) for n in sizes])
    return Curve(kl, mean_of_best("gold"), mean_of_best("score"), mean_of_best("tokens"))


def ppo_curve(rows: Sequence[dict[str, Any]]) -> Curve:
    """Compute means over the responses of each evaluation."""
    evaluations = [list(of_step) for _, of_step in groupby(rows, key=lambda row: row["step"])]

    def means(key: str) -> np.ndarray:
        return np.array([np.mean([row[key] for row in of_step]) for of_step in evaluations])

    return Curve(means("kl"), means("gold"), means("score"), means("tokens"))


def fit_all(curve: Curve) -> dict[str, Fit]:
    """Fit every form by least squares to the half of the points with the lower KL.

    Points nearer to SFT than MIN_KL are left out. If their number is odd, the middle one is fitted
    too.

    Raises:
        ValueError: fewer than four points are left.
    """
    order = [i for i in np.argsort(curve.kl, kind="stable") if curve.kl[i] >= MIN_KL]
    if len(order) < 4:
        raise ValueError(
            f"{len(order)} points have a KL of {MIN_KL} or more, and a fit needs 4; give more "
            "num_updates or num_samples"
        )
    middle = (len(order) + 1) // 2
    near, far = order[:middle], order[middle:]
    fits = {}
    for name, form in FORMS.items():
        columns = form(curve.distance[order])
        coefficients = np.linalg.lstsq(columns[:middle], curve.gold[near], rcond=None)[0]
        errors = columns[middle:] @ coefficients - curve.gold[far]
        fits[name] = Fit(tuple(coefficients.tolist()), float(np.sqrt(np.mean(errors**2))))
    return fits


def curve_table(curves: dict[Key, list[Curve]]) -> str:
    """Format the values of each seed where the mean of gold peaks, and where the curves end."""
    header = ["proxy", "optimiser", "KL at the peak of gold", "gold there", "KL at the end"]
    header += ["proxy at the end", "gold at the end", "end - peak", "tokens at the end"]
    rows = []
    for (proxy, optimiser), of in curves.items():
        peak = int(np.argmax(_mean(of, "gold")))
        cells = [
            values_cell([curve.kl[peak] for curve in of], 1),
            values_cell([curve.gold[peak] for curve in of], 2),
            values_cell([curve.kl[-1] for curve in of], 1),
            values_cell([curve.proxy[-1] for curve in of], 2),
            values_cell([curve.gold[-1] for curve in of], 2),
            values_cell([curve.gold[-1] - curve.gold[peak] for curve in of], 2),
            values_cell([curve.tokens[-1] for curve in of], 1),
        ]
        rows.append([proxy, optimiser, *cells])
    return markdown_table(header, rows)


def fit_table(curves: dict[Key, list[Curve]]) -> str:
    """Format, for each seed, a and b of the optimiser's own form and all forms' held-out errors."""
    rows = []
    for (proxy, optimiser), of in curves.items():
        fits = [fit_all(curve) for curve in of]
        own = own_form(optimiser)
        a, b = zip(*(of_seed[own].coefficients for of_seed in fits), strict=True)
        errors = {name: values_cell([of_seed[name].error for of_seed in fits], 2) for name in FORMS}
        errors[own] = f"**{errors[own]}**"
        rows.append([proxy, optimiser, values_cell(a, 2), values_cell(b, 2), *errors.values()])
    return markdown_table(["proxy", "optimiser", "a", "b", *FORMS], rows)


def own_form(optimiser: str) -> str:
    """Return the form that Gao et al. give for a way to optimise."""
    return BEST_OF_N_FORM if optimiser == BEST_OF_N else RL_FORM


def draw(config: Config, curves: dict[Key, list[Curve]]) -> None:
    """Draw gold and proxy over the distance, with a panel for each reward model and one for
    length."""
    figure = Figure(figsize=(13, 4.6), layout="constrained")
    proxies = list(dict.fromkeys(proxy for proxy, _ in curves))
    panels = figure.subplots(1, len(proxies) + 1, width_ratios=[3] * len(proxies) + [2])
    optimisers = list(dict.fromkeys(optimiser for _, optimiser in curves))
    colours = dict(zip(optimisers, COLOURS, strict=False))
    titles = {FULL: "All rankings", config.small: f"{config.small} rankings"}
    for axes, proxy in zip(panels, proxies, strict=False):
        for optimiser in optimisers:
            _draw_scores(axes, curves[proxy, optimiser], optimiser, colours[optimiser])
        style_axes(axes, titles[proxy], "sqrt(KL to SFT)", "standard deviations above SFT")
    limits = [limit for axes in panels[:-1] for limit in axes.get_ylim()]
    for axes in panels[:-1]:
        axes.set_ylim(min(limits), max(limits))
    for (proxy, optimiser), of in curves.items():
        distance, tokens = _mean(of, "distance"), _mean(of, "tokens")
        style = "-" if proxy == FULL else ":"
        panels[-1].plot(distance, tokens, style, color=colours[optimiser], linewidth=1.6)
    style_axes(panels[-1], "Length", "sqrt(KL to SFT)", f"tokens (dotted: {config.small} rankings)")
    handles = [Line2D([], [], color=colours[name], label=name) for name in optimisers]
    handles += [
        Line2D([], [], color=INK, linestyle="-", label="gold"),
        Line2D([], [], color=INK, linestyle="--", label="proxy"),
        Line2D([], [], color=INK, linestyle=":", label="gold as fitted to the near half"),
    ]
    figure.legend(
        handles=handles,
        loc="outside lower center",
        ncols=len(handles),
        frameon=False,
        fontsize=9,
        labelcolor=INK,
    )
    save_figure(figure, config.plot)


def _draw_scores(axes: Axes, of: Sequence[Curve], optimiser: str, colour: str) -> None:
    """Draw gold solid, proxy dashed, and the fitted curve dotted, all as means over seeds.

    The seeds' own curves are faint.
    """
    for curve in of:
        axes.plot(curve.distance, curve.gold, color=colour, alpha=0.25, linewidth=0.8)
        axes.plot(curve.distance, curve.proxy, "--", color=colour, alpha=0.25, linewidth=0.8)
    distance = _mean(of, "distance")
    axes.plot(distance, _mean(of, "gold"), ".-", color=colour, linewidth=1.8, markersize=5)
    axes.plot(distance, _mean(of, "proxy"), "--", color=colour, linewidth=1.3)
    form = own_form(optimiser)
    # The forms are linear in their coefficients, so mean coefficients give the mean curve.
    coefficients = np.mean([fit_all(curve)[form].coefficients for curve in of], axis=0)
    grid = np.linspace(np.sqrt(MIN_KL), distance.max(), 100)
    axes.plot(grid, FORMS[form](grid) @ coefficients, ":", color=colour, linewidth=1.5)


def _mean(curves: Sequence[Curve], name: str) -> np.ndarray:
    """Return the mean over seeds of an array of points."""
    return np.mean([getattr(curve, name) for curve in curves], axis=0)


def _standardise(curve: Curve, gold: Standard, proxy: Standard) -> Curve:
    return replace(curve, gold=gold(curve.gold), proxy=proxy(curve.proxy))


def _read_marked(folder: Path, run: str) -> list[dict[str, Any]]:
    """Read the responses that a run kept, and add their gold scores."""
    settings = settings_of(EvaluateConfig, run)
    if settings.gold is None:
        raise ValueError(f"the evaluation of {run} has no gold score; this study needs one")
    gold = load_function(settings.gold)(*([settings.gold_path] if settings.gold_path else []))
    rows = read_rows(folder / SAMPLES)
    marks = gold([row["prompt"] for row in rows], [row["response"] for row in rows])
    return [row | {"gold": mark} for row, mark in zip(rows, marks, strict=True)]


def _reward_model_table(config: Config) -> str:
    """Format what the two kinds of reward model have learned."""
    figures = {
        "train_prompts": ("rankings", 0),
        "pair_accuracy": ("accuracy by labels", 3),
        "pair_accuracy_gold": ("accuracy by gold", 3),
        "log_loss": ("held-out loss", 3),
    }
    folders = {FULL: "rm", config.small: f"{FOLDER}/rm_{config.small}"}
    rows = []
    for name, folder in folders.items():
        results = [read_json(Path(run) / folder / RESULTS) for run in config.runs]
        cells = [values_cell([r[key] for r in results], n) for key, (_, n) in figures.items()]
        rows.append([name, *cells])
    return markdown_table(["proxy", *(label for label, _ in figures.values())], rows)


def _report(curves: Sequence[Curve]) -> dict[str, Any]:
    """Return the points and fits of each seed for results.json."""
    return {
        "curves": [
            {name: getattr(curve, name).tolist() for name in ("kl", "gold", "proxy", "tokens")}
            for curve in curves
        ],
        "fits": [
            {name: {"coefficients": f.coefficients, "error": f.error} for name, f in fits.items()}
            for fits in map(fit_all, curves)
        ],
    }


def main() -> None:
    run_stage(study, Config)


if __name__ == "__main__":
    main()
