"""Train a reward model on rankings, step by step."""

import math
from dataclasses import dataclass
from functools import partial
from itertools import chain, repeat

from accelerate.utils import set_seed
from tqdm import tqdm

from rlhf.rewards.models import REWARD_FILE
from rlhf.runs.checkpoints import Checkpoints
from rlhf.runs.folder import MODEL_FILES, folders_released
from rlhf.runs.run import open_run
from rlhf.runs.stateful import Fields, Generators, parts_of
from rlhf.runs.stopwatch import is_bar_hidden
from rlhf.training.nonfinite import with_remedy
from rlhf.training.offloading import free_unused
from rlhf.training.out_of_memory import memory_of
from rlhf.training.processes import naming, start_accelerator, warn_of_float32
from stages.rm.batches import GlobalBatches
from stages.rm.config import Config
from stages.rm.measure import measure
from stages.rm.saved import finish, save_scalar
from stages.rm.setup import inputs_of, load_data, make_state
from stages.rm.update import update


@folders_released()
def train(config: Config) -> None:
    """Train a reward model and write its folder, with the held-out figures in results.json.

    Raises:
        ValueError: the settings, the records or the model cannot be used.
        OSError: a file cannot be read.
    """
    accelerator = start_accelerator()
    warn_of_float32(accelerator, config.model.dtype)
    files = (*MODEL_FILES, REWARD_FILE)
    run = open_run(config, stage="rm", inputs=inputs_of(config), files=files)
    checkpoints = Checkpoints(run, accelerator, config.checkpoint_every)
    data = load_data(config, accelerator)
    set_seed(config.seed)
    first = checkpoints.step or 0
    batches = GlobalBatches(len(data.train_set), config, accelerator, first)
    num_steps = config.num_epochs * len(batches)
    state, packer = make_state(config, data.chat, num_steps, accelerator)
    progress = Progress()
    trained = parts_of(state)
    checkpoints.restore(
        {**trained.shared, "progress": Fields(progress, "first_loss")},
        {**trained.own, "generators": Generators()},
    )
    del trained  # it holds the model, which must be freed before the saved one is loaded
    # Other stages take a folder with a card for a finished reward model.
    (run.dir / REWARD_FILE).unlink(missing_ok=True)
    shares = chain.from_iterable(repeat(batches))
    bar = tqdm(
        range(first + 1, num_steps + 1),
        desc="rm",
        initial=first,
        total=num_steps,
        disable=is_bar_hidden(accelerator.is_main_process),
    )
    for number in bar:
        examples = [data.train_set[i] for i in next(shares)]
        with (
            memory_of("train"),
            naming(accelerator, partial(_place, number)),
            with_remedy(config.optim),
        ):
            metrics = update(state, examples, packer, config)
        if number == 1:
            progress.first_loss = metrics["rm/loss"]
        run.log(number, metrics)
        bar.set_postfix(loss=f"{metrics['rm/loss']:.3f}")
        if number < num_steps:
            if number % len(batches) == 0:
                run.log(number, measure(state, packer, data.held_out, config))
            checkpoints.end_step(number)
    checkpoints.close()
    save_scalar(state, data.chat, run.dir)
    # Free the trained model and its optimizer before the saved model is loaded.
    accelerator.free_memory()
    del state
    free_unused()
    training = {"first_loss": progress.first_loss, "steps": num_steps}
    finish(config, data, run, accelerator, training)


def _place(step: int) -> str:
    return f"phase train of step {step}"


@dataclass
class Progress:
    """Holds what the steps leave for results.json."""

    first_loss: float = math.nan
    """Loss of the first batch, before any step."""
