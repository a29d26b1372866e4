"""Write the files of one tiny world, results.json last."""

import random
from dataclasses import asdict
from pathlib import Path

from data.tinyworld.config import TinyWorldConfig
from data.tinyworld.demonstrations import Quality, write_response
from data.tinyworld.tasks import Instruction, draw_held_out, draw_prompt, understand
from data.tinyworld.text import draw_texts, make_probes
from data.tinyworld.world import WORLD_FILE, World
from rlhf.inputs.files import write_records
from rlhf.inputs.records import Demonstration, Prompt, Record, prompt_key
from rlhf.inputs.streams import python_stream
from rlhf.runs.code import code_of
from rlhf.runs.files import write_json
from rlhf.runs.folder import folders_released, writing

RESULTS_FILE = "results.json"
"""File that is written last, so that a folder without it is unfinished."""
FILES = (
    "text.jsonl",
    "text_held_out.jsonl",
    "demonstrations.jsonl",
    "prompts_rm.jsonl",
    "prompts_ppo.jsonl",
    "prompts_held_out.jsonl",
    "facts_probe.jsonl",
)
"""Files of records."""


@folders_released()
def build(config: TinyWorldConfig) -> None:
    """Write all files of a tiny world. Two runs with equal settings write equal bytes.

    Raises:
        ValueError: the folder was not written by this program (see rlhf.runs.folder).
    """
    folder = Path(config.output_dir)
    settings = asdict(config)
    with writing(
        folder,
        program="data.tinyworld",
        files=(WORLD_FILE, *FILES, RESULTS_FILE),
        settings=settings,
        code=code_of(config, settings),
        overwrite=config.overwrite,
        force=config.force,
    ) as output:
        world = World.from_seed(config.seed)
        files = make_files(world, config)
        output.begin([RESULTS_FILE])
        write_json(folder / WORLD_FILE, world.to_json())
        for name, records in files.items():
            write_records(folder / name, records)
            print(f"wrote {folder / name}: {len(records)} rows")
        write_json(folder / RESULTS_FILE, {name: len(records) for name, records in files.items()})
        output.finish()


def make_files(world: World, config: TinyWorldConfig) -> dict[str, list[Record]]:
    """Return the records of each file by its name.

    No prompt is in two files, and no document is in both texts.
    """
    generator = python_stream(config.seed, "text")
    num_texts = config.num_texts + config.num_texts_held_out
    texts: list[Record] = [*draw_texts(world, num_texts, generator)]
    sizes = {
        "prompts_held_out.jsonl": config.num_prompts_held_out,
        "prompts_ppo.jsonl": config.num_prompts_ppo,
        "prompts_rm.jsonl": config.num_prompts_rm,
        "demonstrations.jsonl": config.num_demonstrations,
    }
    generator = python_stream(config.seed, "prompts")
    num_held_out = sizes.pop("prompts_held_out.jsonl")
    held_out = draw_different(world, num_held_out, generator, is_held_out=True)
    drawn = draw_different(world, sum(sizes.values()), generator, is_held_out=False)
    # Prompts of a small kind are used up by the first draws, and every file needs some.
    generator.shuffle(drawn)
    rest = iter(drawn)
    splits = {name: [next(rest) for _ in range(size)] for name, size in sizes.items()}
    splits["prompts_held_out.jsonl"] = held_out
    demonstrated = splits.pop("demonstrations.jsonl")
    return {
        "text.jsonl": texts[config.num_texts_held_out :],
        "text_held_out.jsonl": texts[: config.num_texts_held_out],
        "demonstrations.jsonl": _demonstrate(demonstrated, config.seed),
        **{name: [_to_prompt(one) for one in split] for name, split in splits.items()},
        "facts_probe.jsonl": [*make_probes(world, python_stream(config.seed, "probe"))],
    }


def draw_different(
    world: World, num_prompts: int, generator: random.Random, *, is_held_out: bool
) -> list[Instruction]:
    """Draw random instructions, no two with the same prompt.

    A held-out instruction asks for a held-out content in its last turn. Other instructions ask for
    none in any turn.
    """
    kept_back = draw_held_out(world)
    seen: set[str] = set()
    drawn: list[Instruction] = []
    # New prompts become rare once most are drawn. After 100 draws for each wanted one, give up.
    for _ in range(100 * num_prompts):
        if len(drawn) == num_prompts:
            return drawn
        prompt = draw_prompt(world, generator)
        key = prompt_key(prompt)
        if key in seen:
            continue
        seen.add(key)
        instruction = understand(world, prompt)
        is_wanted = (
            instruction.task.content in kept_back
            if is_held_out
            else kept_back.isdisjoint(instruction.contents)
        )
        if is_wanted:
            drawn.append(instruction)
    raise ValueError(
        f"{num_prompts} prompts are asked for, but the tiny world has hardly more than {len(drawn)}"
    )


def _demonstrate(instructions: list[Instruction], seed: int) -> list[Record]:
    generator = python_stream(seed, "demonstrations")
    return [
        Demonstration(one.prompt, write_response(one.task, Quality.draw(generator), generator))
        for one in instructions
    ]


def _to_prompt(instruction: Instruction) -> Prompt:
    return Prompt(instruction.prompt, {"kind": instruction.task.kind})
