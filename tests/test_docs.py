"""docs/metrics.md has a row for every metric and alarm, docs/migrate_from_trl.md for every key
of TRL; neither names what is not there."""

import ast
import re
from pathlib import Path

from rlhf.runs.settings import keys_of, load_config
from stages.ppo.config import Config
from stages.ppo.monitor import CODES

ROOT = Path(__file__).parents[1]
STREAMS = {"python_stream", "torch_stream"}
NAME = re.compile(r"(?:ppo|rm|sft|pretrain)/[a-z0-9_]+")
FAMILY = re.compile(r"(?:ppo|rm|sft|pretrain|seconds)/[a-z0-9_/]*NAME")


def logged_names() -> set[str]:
    """Metric names in the stages' code; those that are put together with a NAME in them.

    The names of random streams look the same and are none.
    """
    names = set()
    for path in (ROOT / "stages").rglob("*.py"):
        tree = ast.parse(path.read_text())
        calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
        streams = [one for one in calls if getattr(one.func, "id", "") in STREAMS]
        of_streams = {id(argument) for one in streams for argument in one.args}
        for node in ast.walk(tree):
            if id(node) in of_streams:
                continue
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                names |= {node.value} if NAME.fullmatch(node.value) else set()
            if isinstance(node, ast.DictComp) and isinstance(node.key, ast.JoinedStr):
                names |= {spelt} if FAMILY.fullmatch(spelt := spell(node.key)) else set()
    return names


def spell(text: ast.JoinedStr) -> str:
    """An f-string with NAME for what is filled in."""
    parts = (str(part.value) if isinstance(part, ast.Constant) else "NAME" for part in text.values)
    return "".join(parts)


def documented(pattern: str) -> list[str]:
    text = (ROOT / "docs/metrics.md").read_text()
    return re.findall(rf"^\| `({pattern})` \|", text, flags=re.M)


def test_every_logged_name_has_one_row() -> None:
    rows = documented(f"{NAME.pattern}|{FAMILY.pattern}")
    assert len(rows) == len(set(rows))
    assert logged_names() == set(rows)


def test_every_alarm_has_one_row() -> None:
    assert sorted(documented(r"PPO_\w+")) == sorted(CODES)


MIGRATION = (ROOT / "docs/migrate_from_trl.md").read_text(encoding="utf-8")
MIGRATION_ROWS = re.findall(r"^\| `(\w+)` \| (.*?) \| (.*?) ?\|$", MIGRATION, flags=re.M)
TRL_KEYS = """
    batch_size cliprange cliprange_value dataset_num_proc ds3_gather_for_generation gamma kl_coef
    kl_estimator lam learning_rate local_batch_size local_mini_batch_size
    local_rollout_forward_batch_size micro_batch_size mini_batch_size missing_eos_penalty
    model_adapter_name num_mini_batches num_ppo_epochs num_sample_generations num_total_batches
    push_to_hub ref_adapter_name response_length reward_model_path sft_model_path stop_token
    stop_token_id temperature total_episodes vf_coef whiten_rewards world_size
""".split()
"""The fields of PPOConfig in TRL 1.12.0, which is not installed here."""


def test_every_key_of_trl_has_one_row() -> None:
    names = [name for name, _, _ in MIGRATION_ROWS]
    assert len(names) == len(set(names))
    own, inherited = names[: len(TRL_KEYS)], names[len(TRL_KEYS) :]
    assert sorted(own) == TRL_KEYS
    assert {"per_device_train_batch_size", "bf16"} <= set(inherited)


def test_every_setting_named_for_a_key_of_trl_exists() -> None:
    keys = set(keys_of(Config))
    known = keys | {name for name, _, _ in MIGRATION_ROWS}
    for name, here, more in MIGRATION_ROWS:
        assert here == "not there" or here.strip("`") in keys, name
        assert here != "not there" or more, f"{name} is not there, and no reason is given"
        assert set(re.findall(r"`([^`]+)`", more)) <= known, name


def test_trls_defaults_load_as_settings(tmp_path: Path) -> None:
    [block] = re.findall(r"^```yaml\n(.*?)^```", MIGRATION, flags=re.M | re.S)
    path = tmp_path / "trl.yaml"
    path.write_text(block, encoding="utf-8")
    config = load_config(Config, ["--config", str(path)])
    assert (config.ppo.kl_coef, config.rollout.temperature) == (0.05, 0.7)
    assert (config.reward.missing_end, config.optim.max_grad_norm) == ("none", float("inf"))
    # These are the same in both, so that the block leaves them out.
    ppo = config.ppo
    assert (ppo.clip_range, ppo.value_clip_range, ppo.gamma, ppo.gae_lambda) == (0.2, 0.2, 1, 0.95)
    assert config.optim.weight_decay == 0
