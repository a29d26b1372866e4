"""Tests the measuring of a study's policies: one evaluation for all of a run."""

from dataclasses import replace

from experiments.policies import evaluate_policies
from stages.evaluate.config import Config as EvaluateConfig
from tests.experiments.run_folders import evaluate_config, write_evaluation


def test_policies_are_evaluated_together(run: str) -> None:
    evaluated = []

    def stage(config: EvaluateConfig) -> None:
        evaluated.append(config)
        write_evaluation(config)

    folders = [f"{run}/{name}" for name in ("sft", "ppo", "ppo_ptx", "ppo")]
    together = f"{run}/sweep/evaluation"
    figures = evaluate_policies(run, folders[0], folders, together, stage)
    base = evaluate_config(run, reports={}, output_dir=together, baseline="sft", overwrite=True)
    assert evaluated == [base]  # its policies are these three, under these names
    assert figures[f"{run}/ppo"]["gold_score"] == 1.0
    assert figures[f"{run}/ppo_ptx"]["norm_ratio"] == (0.5 + 3.0) / 2
    assert "norm_ratio" not in figures[f"{run}/ppo"]

    evaluate_policies(run, folders[0], [*folders, f"{run}/sweep/kl_0.5"], together, stage)
    more = base.policies | {"kl_0-5": f"{run}/sweep/kl_0.5"}
    assert evaluated[1:] == [replace(base, policies=more)]
