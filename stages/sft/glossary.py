"""Say what the metrics of SFT mean."""

from rlhf.runs.glossary import Metric

METRICS = (
    Metric(
        "sft/loss",
        "nats a token",
        "Mean cross entropy of the trained tokens of a step.",
        healthy="falls",
        otherwise="Flat: the learning rate is wrong, or the mask trains the wrong tokens "
        "(`python -m data.check` shows it).",
        title="Loss",
    ),
    Metric(
        "sft/token_accuracy",
        "share of tokens",
        "Share of the trained tokens that are the likeliest ones.",
        healthy="rises",
    ),
    Metric(
        "sft/entropy",
        "nats a token",
        "Mean entropy of the distribution of a token.",
        healthy="falls slowly",
    ),
    Metric(
        "sft/grad_norm",
        "",
        "Norm of the gradient before it is clipped to optim.max_grad_norm.",
        healthy="steady",
        otherwise="Growing: lower optim.learning_rate.",
    ),
    Metric("sft/learning_rate", "", "Learning rate of the step.", healthy="follows its schedule"),
    Metric(
        "sft/held_out_loss",
        "nats a token",
        "Mean cross entropy on held-out demonstrations, logged every eval_every steps.",
        healthy="falls, then rises: InstructGPT trained on past its minimum",
        otherwise="Choose by sft/reward_score where there is a reward model.",
    ),
    Metric(
        "sft/text_loss",
        "nats a token",
        "Mean cross entropy on held-out text; only with `text`.",
        healthy="rises little",
        otherwise="Raise the share of text.",
    ),
    Metric(
        "sft/eos_rate",
        "share of responses",
        "Share of the sampled responses that end by themselves; only with reward_model.",
        healthy_range=(0.9, 1.0),
        otherwise="Low: look whether the demonstrations have their end token.",
    ),
    Metric(
        "sft/response_tokens",
        "tokens",
        "Mean length of a sampled response; only with reward_model.",
        healthy="like that of the demonstrations",
    ),
    Metric(
        "sft/reward_score",
        "score",
        "Mean score that reward_model gives to the samples.",
        healthy="rises",
    ),
)
