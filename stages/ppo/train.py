"""Run PPO: set up, then repeat rollout, update and evaluation, then save."""

import time

from tqdm import tqdm

from rlhf.runs.folder import folders_released
from rlhf.runs.stopwatch import is_bar_hidden
from rlhf.training.processes import own_share
from stages.ppo.config import Config
from stages.ppo.evaluate import evaluate, is_due
from stages.ppo.metrics import describe
from stages.ppo.progress import last_line, next_kl_coef
from stages.ppo.rollout import roll_out
from stages.ppo.setup import set_up
from stages.ppo.stopping import save_policy_copy, save_trained_policy, saving_when_stopped
from stages.ppo.update import update


@folders_released()
def train(config: Config) -> None:
    """Run PPO from its settings to the saved policy and results.json."""
    setup = set_up(config)
    accelerator, run, monitor = setup.accelerator, setup.run, setup.monitor
    learner, worker, progress, stopwatch = (
        setup.learner,
        setup.worker,
        setup.progress,
        setup.stopwatch,
    )
    bar = tqdm(
        range(setup.next_update, config.num_updates),
        desc="ppo",
        initial=setup.next_update,
        total=config.num_updates,
        disable=is_bar_hidden(accelerator.is_main_process),
    )
    started = time.perf_counter()
    for number in bar:
        only_value = number < config.ppo.value_warmup_updates
        with saving_when_stopped(learner, monitor, setup.chat, run):
            with accelerator.autocast():
                rollout = roll_out(
                    learner.models.policy,
                    learner.models.value_model,
                    worker,
                    own_share(accelerator, next(setup.prompts)),
                    setup.sampling,
                    accelerator,
                    progress.kl_coef,
                    is_checked=number % config.rollout.check_every == 0,
                    gather=learner.gather,
                )
            with stopwatch.phase("metrics"):
                metrics = describe(rollout, accelerator)
            monitor.inspect(metrics)
            metrics |= update(
                learner,
                rollout,
                setup.texts,
                config,
                setup.shuffling,
                monitor,
                only_value=only_value,
                teacher=worker.teacher,
            )
            monitor.inspect(metrics)
        metrics["ppo/kl_coef"] = progress.kl_coef
        metrics["ppo/learning_rate"] = learner.state.learning_rate
        monitor.end_update(metrics)
        if not only_value:
            progress.kl_coef = next_kl_coef(progress.kl_coef, metrics["ppo/kl"], config)
        if is_due(number, config):
            with stopwatch.phase("evaluate"), accelerator.autocast():
                metrics |= evaluate(learner, worker, setup.held_out, run, number, config)
        seconds = stopwatch.take() | {"update": time.perf_counter() - started}
        started = time.perf_counter()  # the time to save counts for the next update
        metrics |= setup.speed.measure(rollout, metrics, seconds)
        run.alarms(monitor.take_raised())
        run.log(number, metrics | {f"seconds/{name}": value for name, value in seconds.items()})
        bar.set_postfix_str(f"score {metrics['ppo/score']:.2f}, kl {metrics['ppo/kl']:.2f}")
        progress.record(metrics, seconds)
        with stopwatch.phase("save"):
            save_policy_copy(learner, setup.chat, run, number, config.policy_every)
            setup.checkpoints.end_step(number)
    setup.checkpoints.close()

    if learner.state.average is not None:
        learner.state.average.put_in_place()
    save_trained_policy(learner, setup.chat, run.dir)
    told = last_line(progress.metrics, monitor.alarms, config.num_updates)
    accelerator.print(f"ppo: {config.output_dir}: {told}")
    results = progress.metrics | setup.speed.mean()
    results = {name.removeprefix("ppo/"): value for name, value in results.items()}
    phases = {name: round(value, 1) for name, value in progress.seconds.items()}
    run.finish(results | progress.raw_scores | {"alarms": monitor.alarms, "phase_seconds": phases})
