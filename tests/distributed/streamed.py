"""Rollouts of a split policy by an engine that copies its weights, on a stand-in for vLLM."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import repeat
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.utils import DistributedType, gather_object
from peft import LoraConfig
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import rlhf.generation.vllm
from rlhf.generation.answers import Answer
from rlhf.generation.engines import make_engine
from rlhf.generation.settings import GenerationSettings
from rlhf.generation.vllm import full_weights
from rlhf.inputs.chat import Chat
from rlhf.inputs.fitting import FittedPrompt
from rlhf.inputs.packing import Packer
from rlhf.inputs.records import Prompt
from rlhf.models.settings import ModelSettings
from rlhf.rewards.scores import Scored
from rlhf.rewards.settings import RewardSettings
from rlhf.training.processes import own_share, start_accelerator
from rlhf.training.step import make_train_state
from stages.ppo.config import Config, PPOSettings, PtxSettings, RolloutSettings
from stages.ppo.evaluate import evaluate
from stages.ppo.learner import Learner, PolicyAndValue
from stages.ppo.rollout import RolloutWorker, roll_out
from stages.ppo.update import update
from tests.distributed.chain import OPTIM
from tests.distributed.rollouts import whole_models_watched
from tests.rlhf.generation.fake_vllm import cuda_autocast, vllm_installed
from tests.rlhf.tiny_models import byte_tokenizer, change_trained, tiny_policy_of, tiny_scalar_of

KINDS = ("weights", "adapters")
"""What is trained of a policy. The one with adapters has tied embeddings."""
PROMPTS = [FittedPrompt(Prompt("unused"), (5 + i, 6, 7)) for i in range(4)]


class Lengths:
    """Rewards long responses."""

    def score(self, answers: Sequence[Answer]) -> Scored:
        return Scored(torch.tensor([float(len(one.response_ids)) for one in answers]))


def streamed_rollouts() -> dict[str, list[dict[str, Any]]]:
    """Map each of KINDS to what each process saw in `_streamed`."""
    return {kind: gather_object([_streamed(kind)]) for kind in KINDS}


def _streamed(kind: str) -> dict[str, Any]:
    """Make two rollouts with an update between them, then answer a single held-out prompt.

    "whole" has, of each rollout, what `whole_models_watched` gives; the second is not checked.
    "gathered" maps each weight that the engine was given last to all that were whole then, but
    were not before; "types" has the types of the weights given; "different" names those that
    differ in a bit from the weights of the policy gathered as a whole.
    """
    learner, worker = _models(kind)
    models, accelerator = learner.models, learner.state.accelerator
    generator = torch.Generator().manual_seed(accelerator.process_index)
    prompts = own_share(accelerator, PROMPTS)
    seen: dict[str, Any] = {"whole": []}
    is_fsdp = accelerator.distributed_type == DistributedType.FSDP
    # accelerate's own autocast is for the CPU here, and vLLM asks for CUDA's.
    with (
        cuda_autocast(torch.bfloat16) if is_fsdp else nullcontext(),
        _refreshes_watched(learner, seen),
    ):
        for is_checked in (True, False):
            with whole_models_watched([models.policy, models.value_model]) as whole:
                rollout = roll_out(
                    models.policy,
                    models.value_model,
                    worker,
                    prompts,
                    generator,
                    accelerator,
                    is_checked=is_checked,
                    gather=learner.gather,
                )
            seen["whole"].append(whole)
            if is_checked:
                update(learner, rollout, repeat([]), worker.config, torch.Generator())
        run: Any = SimpleNamespace(samples=lambda *_, **__: None)
        evaluate(learner, worker, PROMPTS[:1], run, 0, worker.config)
    return seen


def _models(kind: str) -> tuple[Learner, RolloutWorker]:
    policy = tiny_policy_of("llama", tie_word_embeddings=kind == "adapters")
    if kind == "adapters":
        targets = ["q_proj", "down_proj"]
        policy.add_adapter(LoraConfig(r=2, lora_alpha=6, target_modules=targets))
        change_trained(policy)  # B is zeros
    value_model = tiny_scalar_of("llama")
    accelerator = start_accelerator()
    config = Config(
        output_dir="unused",
        policy=ModelSettings(path="unused"),
        prompts="unused",
        reward=RewardSettings(function="unused:unused"),
        rollout=RolloutSettings(batch_size=len(PROMPTS), max_new_tokens=4),
        ppo=PPOSettings(mini_batch_size=len(PROMPTS)),
        ptx=PtxSettings(coef=0.0),
        optim=OPTIM,
    )
    groups = [(policy, 1e-3), (value_model, 1e-3)]
    both = PolicyAndValue(policy, value_model)
    learner = Learner(make_train_state(both, groups, OPTIM, 10, accelerator), Packer(40))
    with vllm_installed():
        engine = make_engine(GenerationSettings(engine="vllm"))
    chat = Chat(byte_tokenizer("<s>", "</s>", "<pad>", eos_token="</s>", pad_token="<pad>"))
    reference = tiny_policy_of("llama").requires_grad_(False)
    worker = RolloutWorker(chat, reference, Lengths(), learner.packer, config, engine=engine)
    return learner, worker


@contextmanager
def _refreshes_watched(learner: Learner, seen: dict[str, Any]) -> Iterator[None]:
    """Note what `_streamed` says of the weights that an engine is given inside."""
    policy = learner.models.policy
    refresh = rlhf.generation.vllm.VllmEngine.refresh
    given: dict[str, Tensor] = {}
    seen |= {"different": [], "types": []}

    def watched_weights(*args: Any) -> Iterator[tuple[str, Tensor]]:
        before = set(_whole_names(policy))
        seen["gathered"] = {}
        for name, weight in full_weights(*args):
            seen["gathered"][name] = [one for one in _whole_names(policy) if one not in before]
            given[name] = weight.clone()
            yield name, weight
        assert set(_whole_names(policy)) == before

    def watched_refresh(*args: Any) -> None:
        refresh(*args)
        with learner.gather(policy):
            whole = dict(full_weights(policy))
            assert list(whole) == list(given)
            same = [n for n in whole if whole[n].dtype == given[n].dtype]
            equal = [n for n in same if torch.equal(whole[n], given[n])]
        seen["different"] += [name for name in whole if name not in equal]
        seen["types"] = sorted({str(weight.dtype) for weight in given.values()})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rlhf.generation.vllm, "full_weights", watched_weights)
        patch.setattr(rlhf.generation.vllm.VllmEngine, "refresh", watched_refresh)
        yield


def _whole_names(model: nn.Module) -> list[str]:
    return [n for n, p in model.named_parameters() if p.numel() and not isinstance(p, DTensor)]
