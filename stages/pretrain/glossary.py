"""Say what the metrics of pretraining mean."""

from rlhf.runs.glossary import Metric

METRICS = (
    Metric(
        "pretrain/loss",
        "nats a token",
        "Mean cross entropy of a step's batch, logged every log_steps steps.",
        healthy="falls",
        otherwise="Flat: change optim.learning_rate.",
        title="Loss",
    ),
    Metric(
        "pretrain/grad_norm",
        "",
        "Norm of the gradient before it is clipped to optim.max_grad_norm.",
        healthy="steady",
        otherwise="Growing: lower optim.learning_rate.",
    ),
    Metric(
        "pretrain/learning_rate", "", "Learning rate of the step.", healthy="follows its schedule"
    ),
    Metric(
        "pretrain/held_out_loss",
        "nats a token",
        "Mean cross entropy on held-out text, logged every eval_steps steps.",
        healthy="close to pretrain/loss",
        otherwise="Far above: give more text.",
    ),
    Metric(
        "pretrain/fact_recall",
        "share of probes",
        "Share of the fact probes that the model answers right; only with facts_path.",
        healthy="rises to near 1",
        otherwise="Make more passes over the text.",
    ),
)
