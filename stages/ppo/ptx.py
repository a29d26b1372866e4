"""Add the gradient of the pretraining text to a step: the pretraining mix of PPO-ptx."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

from torch import nn

from rlhf.inputs.packing import PromptTree
from rlhf.training import sharding
from rlhf.training.parameters import trained_parameters
from rlhf.training.processes import sum_over_processes
from rlhf.training.step import Step
from rlhf.training.two_gradients import TwoGradients
from stages.ppo.config import PtxSettings
from stages.ppo.learner import Learner

Teacher = Callable[[], AbstractContextManager[nn.Module | None]]
"""Makes a context that gives the model to learn from (ptx.targets reference), or None."""


def no_teacher() -> AbstractContextManager[nn.Module | None]:
    """Give no model, so that the text itself is learned."""
    return nullcontext(None)


class PretrainingMix:
    """Adds the gradient of ptx.coef * (mean nats a text token) to a step.

    This is the last term of Ouyang et al. 2022, eq. 2. With a teacher the nats are
    KL(teacher || policy), which keeps the policy near the teacher on this text (Li and Hoiem 2016,
    eq. 2). Call `add_text` first, then add the losses of the episodes, then call `balance`.

    Args:
        text: This process's blocks. Empty on all processes without ptx.
    """

    def __init__(
        self,
        step: Step,
        learner: Learner,
        text: Sequence[PromptTree],
        settings: PtxSettings,
        teacher: Teacher = no_teacher,
    ) -> None:
        self._step = step
        self._learner = learner
        self._text = text
        self._settings = settings
        self._teacher = teacher
        self._gradients: TwoGradients | None = None
        are_sharded = sharding.shards_gradients(learner.state.accelerator)
        is_measured = settings.gradient_norms or settings.grad_norm_ratio is not None
        if text and (is_measured or are_sharded):
            policy = trained_parameters(learner.models.policy).values()
            self._gradients = TwoGradients(learner.state, list(policy))

    def add_text(self) -> None:
        """Add the text's gradient. With ptx.grad_norm_ratio, `balance` applies its coefficient."""
        if not self._text:
            return
        step, learner = self._step, self._learner
        own_tokens = sum(len(tree.responses[0]) for tree in self._text)
        num_tokens = int(sum_over_processes(learner.state.accelerator, own_tokens))
        coef = self._settings.coef if self._settings.grad_norm_ratio is None else 1.0
        with self._teacher() as teacher:
            for row in step.rows(learner.packer.rows(self._text), more_follow=True):
                nats = learner.text_nats(row, teacher).sum()
                tokens = row.targets.numel()
                step.add(nats * (coef / num_tokens), {"ptx_nats": nats, "ptx_tokens": tokens})
        if self._gradients is not None:
            self._gradients.end_first()

    def balance(self) -> dict[str, float]:
        """Scale the text's gradient to ptx.grad_norm_ratio; return both norms and the cosine.

        Returns {} where nothing is measured.
        """
        if self._gradients is None:
            return {}
        ratio = self._settings.grad_norm_ratio
        found = self._gradients.compare(ratio)
        return {
            "ptx_norm": found.first_norm,
            "ppo_norm": found.second_norm,
            "cosine": found.cosine,
            "ptx_coef": self._settings.coef if ratio is None else found.factor,
        }
