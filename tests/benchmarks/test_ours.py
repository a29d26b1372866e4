"""Runs our sides of the comparison on a tiny model."""

import dataclasses
import sys
from pathlib import Path
from typing import TypedDict

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks.endings import SURE, end_responses_at
from benchmarks.folders import reward_folder
from benchmarks.protocol import Worker
from benchmarks.workload import Workload, every, ppo_prompts, rm_data
from rlhf.inputs.chat import Chat
from rlhf.models.saving import save_policy
from tests.rlhf.tiny_models import byte_tokenizer, tiny_policy_of

OURS = [sys.executable, "-m", "benchmarks.ours"]


class Folders(TypedDict):
    policy: str
    reward_model: str


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    folder = tmp_path_factory.mktemp("bench")
    tokenizer = byte_tokenizer("<s>", "</s>", "<pad>", eos_token="</s>", pad_token="<pad>")
    Chat(tokenizer)
    save_policy(tiny_policy_of("llama", vocab_size=len(tokenizer)), tokenizer, folder / "policy")
    reward = reward_folder(folder / "policy", folder)
    return Folders(policy=str(folder / "policy"), reward_model=str(reward))


@pytest.mark.slow
@pytest.mark.long
def test_rm_worker_trains_epochs(folders: Folders, tmp_path: Path) -> None:
    prompts, responses = rm_data(
        num_prompts=2, k=3, prompt_tokens=6, response_tokens=4, vocab_size=200
    )
    work = Workload(name="rm", kind="rm", prompts=prompts, responses=responses, **folders)
    with Worker(OURS, work, num_threads=1, log=tmp_path / "log") as worker:
        first, second = worker.run(), worker.run()
    assert first["loss"] == second["loss"]  # both report the loss of the first step
    assert 0.1 < first["loss"] < 3
    assert {"gradient", "step"} <= first["phases"].keys()


@pytest.mark.slow
@pytest.mark.long
def test_ppo_worker_makes_updates_with_the_lengths_that_were_asked_for(
    folders: Folders, tmp_path: Path
) -> None:
    prompts = ppo_prompts(lengths=[3, 6, 9], vocab_size=200)
    work = Workload(name="ppo", kind="ppo", prompts=prompts, new_tokens=8, **folders)
    uneven = dataclasses.replace(work, end_positions=every(8, 9))
    for one, total in ((work, 24), (uneven, 6 + 3 + 8)):
        with Worker(OURS, one, num_threads=1, log=tmp_path / "log") as worker:
            samples = [worker.run(), worker.run()]
        assert [sample["new_tokens"] for sample in samples] == [total, total]
        assert sum(one.response_lengths) == total
        assert [sample["ratio"] for sample in samples] == pytest.approx([1, 1], abs=1e-5)
        assert [sample["phases"].get("logprobs", 0) > 0 for sample in samples] == [True, False]
        assert samples[0]["phases"].keys() >= {"rollout", "score", "reference", "value", "train"}


def test_end_token_is_certain_where_it_is_due_and_impossible_elsewhere(
    folders: Folders,
) -> None:
    model = AutoModelForCausalLM.from_pretrained(folders["policy"])
    ids = torch.tensor([[5, 6, 7, 8]])
    plain = model(ids, position_ids=torch.arange(4)[None]).logits
    end_responses_at(model, [2], end_id=1, pad_id=2)
    for keep, kept in ((0, [0, 1, 2, 3]), (2, [2, 3]), (torch.tensor([1, 2]), [1, 2])):
        found = model(ids, position_ids=torch.arange(4)[None], logits_to_keep=keep).logits[0]
        # The token at position 2 is predicted at position 1.
        assert found[:, 1].tolist() == [SURE if place == 1 else -SURE for place in kept]
        assert (found[:, 2] == -SURE).all()
        others = [i for i in range(found.shape[1]) if i not in (1, 2)]
        torch.testing.assert_close(found[:, others], plain[0, kept][:, others])
