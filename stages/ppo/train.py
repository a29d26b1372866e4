"""Run PPO: set up, then repeat rollout, update and evaluation, then save."""

import time
from functools import partial

from tqdm import tqdm

from rlhf.runs.folder import folders_given_back
from rlhf.training import sharding
from rlhf.training.processes import naming, own_share
from stages.ppo.config import Config
from stages.ppo.evaluate import evaluate
from stages.ppo.metrics import describe
from stages.ppo.monitor import Metrics, Monitor
from stages.ppo.progress import next_kl_coef
from stages.ppo.rollout import roll_out
from stages.ppo.setup import set_up
from stages.ppo.stopping import place, save_learned, stopping_well
from stages.ppo.update import update


@folders_given_back()
def train(config: Config) -> None:
    """Run PPO from its settings to the saved policy and results.json."""
    setup = set_up(config)
    accelerator, run, monitor = setup.accelerator, setup.run, setup.monitor
    learner, sampler, progress, watch = setup.learner, setup.sampler, setup.progress, setup.watch
    bar = tqdm(
        range(setup.next_update, config.num_updates),
        desc="ppo",
        initial=setup.next_update,
        total=config.num_updates,
        disable=not accelerator.is_main_process,
    )
    started = time.perf_counter()
    for number in bar:
        models = learner.models
        batch = own_share(accelerator, next(setup.prompts))
        only_value = number < config.ppo.value_warmup_updates
        where = partial(place, watch, number)
        with (
            stopping_well(monitor, number, learner, setup.chat, run),
            naming(accelerator, where),
        ):
            with sharding.whole_weights(accelerator, learner.model), accelerator.autocast():
                rollout = roll_out(
                    models.policy,
                    models.value_model,
                    sampler,
                    batch,
                    setup.sampling,
                    accelerator,
                    progress.kl_coef,
                    is_checked=number % config.rollout.check_every == 0,
                )
            with watch.phase("metrics"):
                metrics = describe(rollout, accelerator)
            monitor.watch(number, metrics)
            metrics |= update(
                learner,
                rollout,
                setup.texts,
                config,
                setup.shuffling,
                only_value=only_value,
                look_at_ratio=partial(_watch_ratio, monitor, number, metrics),
            )
            monitor.watch(number, metrics)
        metrics["ppo/kl_coef"] = progress.kl_coef
        metrics["ppo/learning_rate"] = float(learner.schedule.get_last_lr()[0])
        monitor.end_update(metrics)
        if not only_value:
            progress.kl_coef = next_kl_coef(progress.kl_coef, metrics["ppo/kl"], config)
        if setup.held_out and (number % config.eval_every == 0 or number == config.num_updates - 1):
            whole = sharding.whole_weights(accelerator, learner.model)
            with watch.phase("evaluate"), whole, accelerator.autocast():
                metrics |= evaluate(learner, sampler, setup.held_out, run, number, config)
        seconds = watch.take() | {"update": time.perf_counter() - started}
        started = time.perf_counter()  # the time to save counts for the next update
        metrics |= setup.speed.measure(rollout, metrics, seconds)
        run.log(number, metrics | {f"seconds/{name}": value for name, value in seconds.items()})
        bar.set_postfix_str(f"score {metrics['ppo/score']:.2f}, kl {metrics['ppo/kl']:.2f}")
        progress.note(metrics, seconds)
        with watch.phase("save"):
            setup.checkpoints.end_step(number)
    setup.checkpoints.close()

    if learner.average is not None:
        learner.average.copy_to(learner.models.policy)
    save_learned(learner, setup.chat, run.dir)
    results = progress.metrics | setup.speed.mean()
    results = {name.removeprefix("ppo/"): value for name, value in results.items()}
    phases = {name: round(value, 1) for name, value in progress.seconds.items()}
    run.finish(results | progress.raw_scores | {"alarms": monitor.alarms, "phase_seconds": phases})


def _watch_ratio(monitor: Monitor, update: int, metrics: Metrics, largest: float) -> None:
    monitor.watch(update, {**metrics, "ppo/first_log_ratio": largest})
