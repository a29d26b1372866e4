"""Mistakes of new users give one clear line and exit code 2, and leave no files, in every stage."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import pytest
from safetensors.torch import load_file, save_file

from rlhf.inputs.chat import Chat
from rlhf.inputs.records import PromptLike
from rlhf.models.saving import save_policy
from rlhf.runs.program import USER_ERROR, run_stage
from stages.evaluate.config import Config as EvaluateConfig
from stages.evaluate.evaluate import evaluate
from stages.ppo.config import Config as PPOConfig
from stages.ppo.train import train as train_ppo
from stages.rm.config import Config as RMConfig
from stages.rm.train import train as train_rm
from stages.sft.config import Config as SFTConfig
from stages.sft.train import train as train_sft
from tests.rlhf.tiny_models import byte_tokenizer, tiny_policy_of, tiny_scalar_of

RANKING: dict[str, Any] = {"prompt": "q", "responses": ["a", "b"], "ranks": [1, 2]}
DEMONSTRATION: dict[str, Any] = {"prompt": "q", "response": "a"}
Program = tuple[Callable[[Any], object], type, dict[str, object]]
"""A stage, the class of its settings, and its arguments by name."""

FRUITS: list[dict[str, Any]] = [
    {"prompt": f"Name fruit {i}.", "response": "pear"} for i in range(20)
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a model, a reward model without reward.json, and good records of each kind."""
    folder = tmp_path_factory.mktemp("inputs")
    tokenizer = make_tokenizer()
    save_policy(tiny_policy_of("llama", vocab_size=len(tokenizer)), tokenizer, folder / "model")
    tiny_scalar_of("llama", vocab_size=len(tokenizer)).save(folder / "rm", tokenizer)
    write(folder / "demonstrations.jsonl", FRUITS)
    write(folder / "prompts.jsonl", [{"prompt": f"Name fruit {i}."} for i in range(4)])
    write(folder / "rankings.jsonl", [{**RANKING, "prompt": f"question {i}"} for i in range(20)])
    return folder


def make_tokenizer(*more: str) -> Any:
    tokenizer = byte_tokenizer(
        "<s>", "</s>", "<pad>", *more, eos_token="</s>", pad_token="<pad>", bos_token="<s>"
    )
    return Chat(tokenizer).tokenizer


def too_few(
    prompts: list[PromptLike], responses: list[str], metas: list[dict[str, Any]]
) -> list[float]:
    return [0.0]


def one_not_a_number(
    prompts: list[PromptLike], responses: list[str], metas: list[dict[str, Any]]
) -> list[float]:
    return [0.0, float("nan")] + [0.0] * (len(responses) - 2)


def no_list(prompts: list[PromptLike], responses: list[str], metas: list[dict[str, Any]]) -> float:
    return 1.0


def failing(
    prompts: list[PromptLike], responses: list[str], metas: list[dict[str, Any]]
) -> list[float]:
    raise KeyError("no such\nkey")


def one_token_short(
    prompts: list[PromptLike],
    responses: list[str],
    metas: list[dict[str, Any]],
    tokens: list[list[str]],
) -> list[list[float]]:
    return [[0.0] * (len(pieces) - 1) for pieces in tokens]


def constant(
    prompts: list[PromptLike], responses: list[str], metas: list[dict[str, Any]]
) -> list[float]:
    return [0.5] * len(responses)


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def refusal(
    function: Callable[[Any], object],
    config_class: type,
    args: dict[str, object],
    capsys: pytest.CaptureFixture[str],
    *,
    behind_a_bar: bool = False,
) -> str:
    """Return the line on stderr of a program that must refuse its input and write nothing.

    An error in the first update has one line of its own below the progress bar.
    """
    words = [word for key, value in args.items() for word in (f"--{key}", str(value))]
    output = Path(str(args["output_dir"]))
    with pytest.raises(SystemExit) as stopped:
        run_stage(function, config_class, words)
    assert stopped.value.code == USER_ERROR
    message = capsys.readouterr().err.strip()
    if behind_a_bar:
        bar, message = message.split("\n")
        assert bar.startswith("ppo: ")
    assert message.startswith("error: ")
    assert "Traceback" not in message
    assert not output.exists(), f"half-written: {list(output.iterdir())}"
    return message


def sft(folder: Path, tmp_path: Path, **changes: object) -> Program:
    args: dict[str, object] = {
        "model.path": folder / "model",
        "demonstrations": folder / "demonstrations.jsonl",
        "output_dir": tmp_path / "sft",
        "held_out": 0.3,
    }
    return train_sft, SFTConfig, args | {k.replace("__", "."): v for k, v in changes.items()}


def rm(folder: Path, tmp_path: Path, rankings: Path, **changes: object) -> Program:
    args: dict[str, object] = {
        "model.path": folder / "model",
        "rankings": f"[{rankings}]",
        "demonstrations": folder / "demonstrations.jsonl",
        "output_dir": tmp_path / "rm",
        "held_out": 0.3,
    }
    return train_rm, RMConfig, args | {k.replace("__", "."): v for k, v in changes.items()}


def ppo(folder: Path, tmp_path: Path, **changes: object) -> Program:
    args: dict[str, object] = {
        "policy.path": folder / "model",
        "prompts": folder / "prompts.jsonl",
        "reward.model": folder / "rm",
        "ptx.coef": 0,
        "rollout.max_prompt_tokens": 60,
        "rollout.max_new_tokens": 8,
        "output_dir": tmp_path / "ppo",
    }
    return train_ppo, PPOConfig, args | {k.replace("__", "."): v for k, v in changes.items()}


def test_empty_file(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    empty = write(tmp_path / "empty.jsonl", [])
    message = refusal(*sft(folder, tmp_path, demonstrations=empty), capsys)
    assert "empty.jsonl" in message
    message = refusal(*rm(folder, tmp_path, empty), capsys)
    assert "empty.jsonl" in message


def test_missing_field(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [DEMONSTRATION, {"prompt": "q"}]
    path = write(tmp_path / "rows.jsonl", rows)
    message = refusal(*sft(folder, tmp_path, demonstrations=path), capsys)
    assert "rows.jsonl" in message
    assert "row 2" in message
    assert "response" in message


def test_misspelt_field(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "rows.jsonl", [{"prompt": "q", "respones": "a"}])
    message = refusal(*sft(folder, tmp_path, demonstrations=path), capsys)
    assert "respones" in message
    assert "response" in message


def test_ranks_of_the_wrong_length(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "rows.jsonl", [RANKING, {**RANKING, "ranks": [1, 2, 3]}])
    message = refusal(*rm(folder, tmp_path, path), capsys)
    assert "row 2" in message
    assert "ranks" in message


def test_all_tied(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{**RANKING, "prompt": f"q{i}", "ranks": [1, 1]} for i in range(20)]
    path = write(tmp_path / "rows.jsonl", rows)
    message = refusal(*rm(folder, tmp_path, path), capsys)
    assert "all are tied" in message


def test_one_response(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "rows.jsonl", [{"prompt": "q", "responses": ["a"], "ranks": [1]}])
    message = refusal(*rm(folder, tmp_path, path), capsys)
    assert "row 1" in message
    assert "responses" in message


def test_prompt_longer_than_the_context(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "prompts.jsonl", [{"prompt": "why " * 100}])
    message = refusal(*ppo(folder, tmp_path, prompts=path), capsys)
    assert "prompts.jsonl" in message
    assert "max_prompt_tokens" in message
    message = refusal(*ppo(folder, tmp_path, rollout__max_prompt_tokens=5000), capsys)
    assert "5000" in message
    assert "max_prompt_tokens" in message


def test_file_that_is_not_utf8(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"prompt": "q", "response": "caf\xe9"}\n')
    message = refusal(*sft(folder, tmp_path, demonstrations=path), capsys)
    assert "UTF-8" in message
    assert "row 1" in message


def test_model_folder_without_weights(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(folder / "model", tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    message = refusal(*sft(folder, tmp_path, model__path=tmp_path / "model"), capsys)
    assert "model.safetensors" in message


def test_reward_model_folder_without_a_head(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(folder / "rm", tmp_path / "rm")
    weights = load_file(tmp_path / "rm" / "model.safetensors")
    del weights["score.weight"]
    save_file(weights, tmp_path / "rm" / "model.safetensors", metadata={"format": "pt"})
    message = refusal(*ppo(folder, tmp_path, reward__model=tmp_path / "rm"), capsys)
    assert "no reward head" in message


def test_reward_model_folder_without_its_card(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = refusal(*ppo(folder, tmp_path), capsys)
    assert "reward.json" in message


def test_tokenizer_of_another_model(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(folder / "model", tmp_path / "model")
    make_tokenizer(*(f"<more {i}>" for i in range(9))).save_pretrained(tmp_path / "model")
    message = refusal(*sft(folder, tmp_path, model__path=tmp_path / "model"), capsys)
    assert "tokenizer of another model" in message


def test_misspelt_setting(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = refusal(*ppo(folder, tmp_path, ppo__kl_coeff=0.1), capsys)
    assert "ppo.kl_coeff" in message
    assert "did you mean ppo.kl_coef?" in message


def test_folder_that_is_not_there(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = refusal(*sft(folder, tmp_path, model__path=tmp_path / "nowhere"), capsys)
    assert "nowhere" in message
    message = refusal(*ppo(folder, tmp_path, prompts=tmp_path / "nothing.jsonl"), capsys)
    assert "nothing.jsonl" in message


class Rewarded(Protocol):
    def __call__(self, reward: str, *, behind_a_bar: bool = False, **changes: object) -> str: ...


@pytest.fixture
def rewarded(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Rewarded:
    """Return the refusal of a PPO run whose reward has these settings, in a YAML file."""

    def run(reward: str, *, behind_a_bar: bool = False, **changes: object) -> str:
        path = tmp_path / "reward.yaml"
        path.write_text(f"reward: {reward}\n")
        train, config_class, args = ppo(folder, tmp_path, config=path, **changes)
        del args["reward.model"]
        args |= {"rollout.batch_size": 4, "ppo.mini_batch_size": 4}
        return refusal(train, config_class, args, capsys, behind_a_bar=behind_a_bar)

    return run


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        ("{}", "reward.model is None, function is None, .*give exactly one"),
        ("{function: 'a:b', parts: {x: {function: 'a:b'}}}", "give exactly one"),
        ("{part: {x: {function: 'a:b'}}}", "unknown setting reward.part; did you mean reward.par"),
        ("{parts: {x: {functon: 'a:b'}}}", "reward.parts.x.functon; did you mean .*x.function"),
        ("{parts: {x: {}}}", "reward.parts.x.model is None and function is None; give exactly"),
        ("{parts: {x: {function: 'a:b', weight: 0}}}", "reward.parts.x.weight is 0"),
        ("{parts: {x: 3}}", "reward.parts takes a section for every name, with the keys model"),
        ("{ensemble: {models: [rm]}}", "reward.ensemble.models has one member"),
        ("{ensemble: {models: [a, b], combine: median}}", "mean_minus_spread"),
        ("{ensemble: {model: [a, b]}}", "did you mean reward.ensemble.models"),
        ("{function: 'a:b', length_penalty: -1}", "reward.length_penalty is -1"),
        ("{function: 'tests.test_bad_input:shrt'}", "has no function 'shrt'"),
        ("{function: tests.test_bad_input.failing}", "write package.module:name"),
        ("{parts: {x: {function: 'nowhere:f'}}}", "cannot import nowhere"),
        ("{model: no/where/rm}", "no/where/rm"),
        (
            "{function: 'tests.test_bad_input:constant', normalize_on: 4}",
            "all 4 samples for reward.normalize_on score 0.5",
        ),
    ],
)
@pytest.mark.slow
def test_rewards_that_cannot_be_had(rewarded: Rewarded, reward: str, message: str) -> None:
    assert re.search(message, rewarded(reward))


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (
            "too_few",
            r"returned 1 entries for 4 responses, and the first difference is at row 1 \(.*jsonl, "
            r"row \d+\); it",
        ),
        ("one_not_a_number", r"one_not_a_number gave nan for row 1 \(.*jsonl, row \d+\); it must"),
        ("no_list", "no_list returned float; it must return a list with one number a response"),
        ("failing", r"failing failed on row 0 \(.*jsonl, row \d+\), response .*KeyError: 'no such"),
        (
            "one_token_short",
            r"gave \d numbers for row 0 \(.*jsonl, row \d+\), whose response has \d tokens",
        ),
    ],
)
@pytest.mark.slow
def test_functions_that_give_something_else(
    rewarded: Rewarded, function: str, message: str
) -> None:
    per_token = function == "one_token_short"
    reward = f"{{function: 'tests.test_bad_input:{function}', per_token: {per_token}}}"
    assert re.search(message, rewarded(reward, behind_a_bar=True))


def test_a_value_model_that_cannot_read_the_policys_tokens(
    folder: Path, tmp_path: Path, rewarded: Rewarded
) -> None:
    shutil.copytree(folder / "rm", tmp_path / "rm")
    byte_tokenizer("<e>", "<p>", eos_token="<e>", pad_token="<p>").save_pretrained(tmp_path / "rm")
    reward = "{function: 'tests.test_bad_input:constant'}"
    message = rewarded(reward, value_model=tmp_path / "rm")
    assert "has another vocabulary than the policy" in message
    assert "null for a new head on the policy's body" in message


REFUSES_SYSTEM = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system turn') }}"
    "{% endif %}{{ m['content'] }}{{ eos_token }}{% endfor %}"
)


@pytest.mark.parametrize("stage", ["sft", "rm", "rm_bias", "ppo", "ppo_held_out", "evaluate"])
def test_a_prompt_that_the_template_refuses_is_named(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], stage: str
) -> None:
    """Row 3 of each file has a system turn, the others have none."""
    model = tmp_path / "model"
    shutil.copytree(folder / "model", model)
    (model / "chat_template.jinja").write_text(REFUSES_SYSTEM)
    asked = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    kinds: dict[str, dict[str, Any]] = {
        "demonstrations": DEMONSTRATION,
        "rankings": RANKING,
        "prompts": {"prompt": "q"},
    }
    bad = {
        name: write(
            tmp_path / f"{name}.jsonl",
            [row | {"prompt": asked if i == 2 else f"q{i}"} for i in range(9)],
        )
        for name, row in kinds.items()
    }
    programs: dict[str, Program] = {
        "sft": sft(folder, tmp_path, model__path=model, demonstrations=bad["demonstrations"]),
        "rm": rm(folder, tmp_path, bad["rankings"], model__path=model),
        "rm_bias": rm(
            folder,
            tmp_path,
            folder / "rankings.jsonl",
            model__path=model,
            demonstrations=bad["demonstrations"],
        ),
        "ppo": ppo(folder, tmp_path, policy__path=model, prompts=bad["prompts"]),
        "ppo_held_out": ppo(folder, tmp_path, policy__path=model, prompts_held_out=bad["prompts"]),
        "evaluate": (
            evaluate,
            EvaluateConfig,
            {
                "policies.a": model,
                "prompts": bad["prompts"],
                "max_prompt_tokens": 40,
                "output_dir": tmp_path / "evaluate",
            },
        ),
    }
    message = refusal(*programs[stage], capsys)
    assert re.match(r"error: .*\.jsonl, row 3: the chat template refuses a prompt with", message)


def test_rankings_of_equal_responses_alone(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{**RANKING, "prompt": f"q{i}", "responses": ["a", "a"]} for i in range(20)]
    rankings = write(tmp_path / "equal.jsonl", rows)
    message = refusal(*rm(folder, tmp_path, rankings), capsys)
    assert "orders two responses: all are tied, unranked, even, equal to each other" in message
