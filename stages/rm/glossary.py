"""Say what the metrics of the reward model mean."""

from rlhf.runs.glossary import Metric

METRICS = (
    Metric(
        "rm/loss",
        "nats a pair",
        "Mean over prompts, by their weights, of the mean loss over the pairs of a prompt.",
        healthy="falls from about 0.69, which is log 2",
        otherwise="Above 0.69 for long: labels are flipped, or the learning rate is too high.",
        title="Loss",
    ),
    Metric(
        "rm/accuracy",
        "share of pairs",
        "Share of the step's pairs that are ordered right.",
        healthy="rises from about 0.5",
        otherwise="1.0 early: the responses give the label away.",
        title="Pair accuracy",
    ),
    Metric(
        "rm/margin",
        "score",
        "Mean score of the better response of a pair minus that of the worse.",
        healthy="rises",
    ),
    Metric(
        "rm/pairs",
        "pairs",
        "Pairs of the step. Even pairs, of probability 0.5, are left out.",
        healthy="depends on K and on ties",
    ),
    Metric(
        "rm/grad_norm",
        "",
        "Norm of the gradient before it is clipped to optim.max_grad_norm.",
        healthy="steady",
        otherwise="Growing: lower optim.learning_rate.",
    ),
    Metric("rm/learning_rate", "", "Learning rate of the step.", healthy="follows its schedule"),
    Metric(
        "rm/held_out_loss",
        "nats a pair",
        "Mean loss of a held-out pair, logged after each epoch.",
        healthy="below 0.69 and falling",
        otherwise="Rising while rm/loss falls: the model overfits; train fewer epochs.",
    ),
    Metric(
        "rm/held_out_accuracy",
        "share of pairs",
        "Share of the held-out pairs that are ordered right, logged after each epoch.",
        healthy="above length_baseline of results.json",
        otherwise="Give more rankings; PPO refuses a model that may be no better than a coin.",
    ),
    Metric(
        "rm/held_out_accuracy_gold",
        "share of pairs",
        "The same against the gold score instead of the labels; only with `gold`.",
        healthy="above rm/held_out_accuracy, since labels are noisy",
        otherwise="Below it: the labelers err in one direction.",
    ),
)
