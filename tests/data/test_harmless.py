"""The two halves of Anthropic's pairs share no dialogue, and PPO learns from only one of them."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from data.harmless import HarmlessConfig, build, first_turn
from rlhf.inputs.files import read_records
from rlhf.inputs.records import Demonstration, Prompt, Ranking

FIRST_TURNS = [f"Is it right to take {i} apples?" for i in range(60)]


def dialogue(first: str, *later: str) -> str:
    return "".join(f"\n\nHuman: {turn}\n\nAssistant: I see." for turn in (first, *later))


def pair(history: str) -> dict[str, str]:
    question = history.rsplit("\n\nAssistant:", 1)[0]
    return {
        "chosen": f"{question}\n\nAssistant: Ask first.",
        "rejected": f"{question}\n\nAssistant: Take them.",
    }


def write(path: Path, rows: list[Any], *, as_lines: bool = True) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows) if as_lines else json.dumps(rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())


@pytest.fixture
def config(tmp_path: Path) -> HarmlessConfig:
    shared = tmp_path / "shared"
    # Two pairs continue each first turn: one directly, one a turn later.
    histories = [dialogue(first, *later) for first in FIRST_TURNS for later in ((), ("Why?",))]
    write(shared / "hh_rlhf" / "harmless-base.test.jsonl.gz", [pair(one) for one in histories])
    task = {"instruction": "Say yes.", "instances": [{"input": "", "output": "Yes."}]}
    write(shared / "self_instruct" / "seed_tasks.jsonl", [task])
    alpaca = [{"instruction": "Say no.", "input": "", "output": "No."}]
    write(shared / "alpaca_en_demo" / "alpaca_en_demo.json", alpaca, as_lines=False)
    rule = {"kind": "words_at_most", "count": 3}
    meta = {"instructions": [rule]}
    write(tmp_path / "instructions" / "prompts.jsonl", [{"prompt": "Be brief.", "meta": meta}])
    return HarmlessConfig(
        output_dir=str(tmp_path / "data"),
        instructions=str(tmp_path / "instructions"),
        shared=str(shared),
    )


def test_no_dialogue_is_on_two_sides(config: HarmlessConfig) -> None:
    build(config)
    folder = Path(config.output_dir)
    policy, judge, held_out = (
        read_records(folder / f"{name}.jsonl", Ranking)
        for name in ("rankings", "rankings_judge", "rankings_held_out")
    )
    sides = [{first_turn(one) for one in side} for side in (policy, judge, held_out)]
    assert all(sides)
    assert sum(len(side) for side in sides) == len(set.union(*sides)) == len(FIRST_TURNS)
    assert len(policy) + len(judge) + len(held_out) == 2 * len(FIRST_TURNS)

    prompts = read_records(folder / "prompts.jsonl", Prompt)
    assert [one.key for one in prompts[:-1]] == [one.key for one in policy]
    assert prompts[-1].meta["instructions"][0]["kind"] == "words_at_most"
    demonstrations = read_records(folder / "demonstrations.jsonl", Demonstration)
    assert {one.response for one in demonstrations[:-2]} == {"Ask first."}
    assert [one.response for one in demonstrations[-2:]] == ["Yes.", "No."]
    held_out_prompts = read_records(folder / "prompts_held_out.jsonl", Prompt)
    assert {one.key for one in held_out_prompts} == {one.key for one in held_out}


def test_missing_instructions_are_named_before_anything_is_written(config: HarmlessConfig) -> None:
    missing = Path(config.instructions, "prompts.jsonl")
    missing.unlink()
    with pytest.raises((ValueError, OSError), match=str(missing)):
        build(config)
    assert not Path(config.output_dir).exists()
