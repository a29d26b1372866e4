"""Takes architectures that differ from a dense Llama through the stages."""

import json
import logging
from pathlib import Path

import pytest
import torch
from datasets import Dataset

from rlhf.inputs.packing import Layout, Packer, PromptTree
from rlhf.models.loading import load_policy
from rlhf.models.passes import compute_logprobs
from rlhf.models.settings import ModelSettings
from rlhf.runs.settings import load_config
from stages.sft.config import Config
from stages.sft.trainer import make_trainer
from tests.long.architectures import stages_of, tokenizer, write_data
from tests.rlhf.every_architecture import save_tiny
from tools.plan.launch import Launch
from tools.plan.make import make_plan

pytestmark = pytest.mark.filterwarnings("ignore:.*(cannot take the packing mask|samples )")
ROUTER = "output_router_logits"


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_5_text"])
def test_all_stages_run(model_type: str, tmp_path: Path) -> None:
    """One has a mixture of experts, the other linear attention beside full attention."""
    save_tiny(model_type, tokenizer(), tmp_path / "base")
    write_data(tmp_path)
    for run in stages_of(tmp_path).values():
        run()
    folders = [tmp_path / name for name in ("base", "sft", "ppo")]
    configs = [json.loads((folder / "config.json").read_text()) for folder in folders]
    assert len({config.get(ROUTER) for config in configs}) == 1


@pytest.mark.parametrize(
    ("model_type", "is_fused"), [("recurrent_gemma", False), ("granite", True), ("mixtral", True)]
)
def test_sft_learns_by_the_models_own_logits(
    model_type: str, is_fused: bool, tmp_path: Path
) -> None:
    """These may be capped in a way that TRL's fused head does not know.

    There is no loss over experts if the base's config does not ask for one.
    """
    save_tiny(model_type, tokenizer(), tmp_path / "base")
    policy = load_policy(ModelSettings(path=str(tmp_path / "base")))
    trees = [PromptTree((5, 6, 7), ((8, 9, 1),)), PromptTree((20, 21), ((22, 23, 24, 25, 1),))]
    expected = compute_logprobs(policy, trees, Packer(64, layout=Layout.ALONE))
    words = ["--model.path", "base", "--demonstrations", "none.jsonl", "--output_dir", "none"]
    config = load_config(Config, [*words, "--batch_size", "2"])
    trainer = make_trainer(policy, tokenizer(), trees, config, str(tmp_path / "run"))
    assert trainer.is_fused == is_fused
    rows = trainer.train_dataset
    assert isinstance(rows, Dataset)
    batch = trainer.data_collator([rows[i] for i in range(2)])
    count = torch.tensor(8)
    loss = trainer.compute_loss(policy, batch, num_items_in_batch=count)
    assert loss.item() == pytest.approx(-expected.sum().item() / 8, rel=1e-4)
    loss.backward()


class KeepingHandler(logging.Handler):
    """Keeps all records that are logged."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


def test_an_architecture_that_cannot_be_planned_is_named(tmp_path: Path) -> None:
    handler = KeepingHandler()
    logging.getLogger("torch._subclasses.fake_tensor").addHandler(handler)
    save_tiny("mixtral", tokenizer(), tmp_path / "base")
    words = ["--model.path", str(tmp_path / "base"), "--demonstrations", "d.jsonl"]
    config = load_config(Config, [*words, "--output_dir", str(tmp_path / "sft")])
    with pytest.raises(ValueError, match="base cannot be planned") as error:
        make_plan(config, Launch())
    assert "\n" not in str(error.value)
    assert not handler.records, "torch's own traceback"
