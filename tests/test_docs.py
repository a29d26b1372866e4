"""docs/migrate_from_trl.md has a row for every key of TRL, and names only settings that exist."""

import re
from pathlib import Path

from rlhf.runs.settings import keys_of, load_config
from stages.ppo.config import Config

ROOT = Path(__file__).parents[1]
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
