"""Say what the metrics and the alarms of PPO mean.

A token is a response token here, and the end token of a response counts as one.
"""

from rlhf.runs.glossary import Alarm, Metric

ROLLOUT = (
    Metric(
        "ppo/score",
        "score",
        "Mean score of a response, after the clip and the charge for a missing end.",
        healthy="rises, then levels off",
        otherwise="Flat: look at ppo/score_std, the learning rate and samples.jsonl. Rising for "
        "ever: trust an independent judge, not the score.",
        title="Score",
    ),
    Metric(
        "ppo/score_std",
        "score",
        "Standard deviation of the scores of the rollout.",
        healthy="above 0; falls as answers get alike",
        otherwise="0: the reward tells nothing apart (PPO_ZERO_ADV).",
    ),
    Metric(
        "ppo/part/NAME",
        "score",
        "Mean of one part of the score, before its weight, over the responses that it judges. NAME "
        "is a key of reward.parts. An "
        "ensemble has the parts member_0, member_1 and so on, and `spread`, which is a variance.",
        healthy="moves with the score",
        otherwise="One part falls while another rises: the weights trade them off.",
    ),
    Metric(
        "ppo/reward",
        "score",
        "Mean over responses of the score minus the KL penalty. This is what PPO maximises.",
        healthy="rises",
        otherwise="Falling while the score rises: the policy pays more KL than it gains.",
    ),
    Metric(
        "ppo/kl",
        "nats a response",
        "KL from the reference policy: the mean over responses of the log-ratio (k1) summed over "
        "tokens.",
        healthy="0 at the start, then some nats, by the task",
        otherwise="Negative: PPO_NEG_KL. Tens of nats: raise ppo.kl_coef.",
        title="KL to the reference",
    ),
    Metric(
        "ppo/kl_error",
        "nats a response",
        "Standard error of ppo/kl.",
        healthy="small against ppo/kl",
        otherwise="Raise rollout.batch_size.",
    ),
    Metric(
        "ppo/kl_k3",
        "nats a response",
        "The same KL by the estimator k3, which is never negative.",
        healthy="near ppo/kl",
        otherwise="Far above: the policy picks single tokens that the reference finds impossible.",
    ),
    Metric(
        "ppo/kl_coef",
        "score a nat",
        "Coefficient of the KL penalty in this update.",
        healthy="constant, or moving with ppo.kl_target",
        otherwise="Moving one way for long: the target cannot be met.",
    ),
    Metric(
        "ppo/reference_difference",
        "nats a token",
        "Mean absolute log-ratio of a token to the reference.",
        healthy="0 before the first update",
        otherwise="PPO_REFERENCE",
    ),
    Metric(
        "ppo/reference_difference_high",
        "nats",
        "The absolute log-ratio that one token in a thousand exceeds.",
        healthy="0 before the first update",
        otherwise="PPO_REFERENCE",
    ),
    Metric(
        "ppo/response_tokens",
        "tokens",
        "Mean length of a response.",
        healthy="changes slowly",
        otherwise="PPO_LENGTH",
        title="Response length",
    ),
    Metric(
        "ppo/eos_rate",
        "share of responses",
        "Share of the responses that end by themselves.",
        healthy_range=(0.9, 1.0),
        otherwise="PPO_NO_EOS",
        title="Responses that end",
    ),
    Metric(
        "ppo/distinct_2",
        "share of bigrams",
        "Number of different bigrams divided by the number of all bigrams. Each process counts "
        "its own responses.",
        healthy="steady, or falls slowly",
        otherwise="PPO_REPEAT",
        title="Different bigrams",
    ),
    Metric(
        "ppo/one_answer",
        "share of prompts",
        "Share of the rollout's different prompts that get the most frequent response, word for "
        "word. Each process counts its own responses.",
        healthy="some percent, unless many prompts have one right answer",
        otherwise="PPO_ONE_ANSWER",
        title="Most frequent response",
    ),
    Metric(
        "ppo/value",
        "score",
        "Mean value of the state before a token.",
        healthy="near ppo/return",
        otherwise="Look at ppo/value_error.",
    ),
    Metric("ppo/return", "score", "Mean return of a token.", healthy="follows the score"),
    Metric(
        "ppo/value_error",
        "score",
        "Root mean square of return minus value.",
        healthy="falls, and is below ppo/score_std",
        otherwise="PPO_VALUE_CLIP; raise value_learning_rate or ppo.value_warmup_updates.",
    ),
    Metric(
        "ppo/explained_variance",
        "share of variance",
        "1 minus the variance of return minus value, divided by the variance of the returns.",
        healthy="rises towards 1",
        healthy_range=(0.0, 1.0),
        otherwise="Negative for long: the value model hurts. Start it from the reward model, or "
        "set ppo.value_warmup_updates.",
        title="Variance explained",
    ),
    Metric(
        "ppo/advantage_std",
        "score",
        "Standard deviation of the advantages before they are whitened.",
        healthy="above 0",
        otherwise="0: PPO_ZERO_ADV",
    ),
)

SAMPLER_CHECK = (
    Metric(
        "ppo/entropy",
        "nats a token",
        "Mean entropy of the distribution of a token. This metric and the next four are logged in "
        "the updates that rollout.check_every picks, by default in all.",
        healthy="falls slowly",
        otherwise="Near 0: the policy tries nothing new; raise ppo.kl_coef.",
        title="Entropy",
    ),
    Metric(
        "ppo/sampler_difference",
        "nats a token",
        "Mean absolute difference between the log-probability that the sampler saw for a sampled "
        "token and the trainer's.",
        healthy="below 1e-5 in fp32, below 0.05 in bf16",
        otherwise="PPO_SAMPLER",
    ),
    Metric(
        "ppo/sampler_difference_high",
        "nats",
        "The absolute difference that one token in a thousand exceeds.",
        healthy="below 1e-4 in fp32, below 0.5 in bf16",
        otherwise="PPO_SAMPLER",
    ),
    Metric(
        "ppo/sampler_excess",
        "nats a token",
        "How much less likely the sampled tokens are than the policy's distribution says: the mean "
        "negative log-probability minus the mean entropy.",
        healthy="0 within noise",
        otherwise="PPO_SAMPLER",
    ),
    Metric(
        "ppo/sampler_z",
        "standard errors",
        "ppo/sampler_excess divided by its standard error.",
        healthy_range=(-4.0, 4.0),
        otherwise="PPO_SAMPLER",
    ),
)

UPDATE = (
    Metric(
        "ppo/policy_loss",
        "",
        "Clipped surrogate loss, mean over the tokens and steps of the update.",
        healthy="small, of either sign; it means nothing by itself",
    ),
    Metric(
        "ppo/value_loss",
        "score squared",
        "Half the squared error of the values, mean over tokens and steps.",
        healthy="falls",
        otherwise="PPO_VALUE",
    ),
    Metric(
        "ppo/ratio",
        "",
        "Mean ratio of new to old probability of a token.",
        healthy="1 within some hundredths",
        otherwise="PPO_CLIP, PPO_UPDATE_KL",
    ),
    Metric(
        "ppo/first_log_ratio",
        "nats a token",
        "Mean absolute log-ratio of a token in the first step on the rollout. In updates without a "
        "check of the sampler it compares the trainer with the sampler.",
        healthy="0 within rounding; below 1e-5 without a check",
        otherwise="PPO_RATIO",
    ),
    Metric(
        "ppo/first_log_ratio_high",
        "nats",
        "The absolute log-ratio that one token in a thousand exceeds in that step.",
        healthy="0 within rounding; below 1e-4 without a check",
        otherwise="PPO_RATIO",
    ),
    Metric(
        "ppo/approx_kl",
        "nats a token",
        "KL by the estimator k3 between the policy of a step and the one that sampled.",
        healthy_range=(0.0, 0.02),
        otherwise="PPO_UPDATE_KL",
        title="Step from the policy that sampled",
    ),
    Metric(
        "ppo/clip_fraction",
        "share of tokens",
        "Share of the tokens whose ratio is clipped.",
        healthy_range=(0.0, 0.2),
        otherwise="PPO_CLIP",
        title="Clipped tokens",
    ),
    Metric(
        "ppo/value_clip_fraction",
        "share of tokens",
        "Share of the tokens whose value is clipped.",
        healthy="after some updates",
        healthy_range=(0.0, 0.3),
        otherwise="Raise ppo.value_clip_range.",
    ),
    Metric(
        "ppo/steps",
        "steps",
        "Optimizer steps of the update.",
        healthy="epochs times mini-batches",
        otherwise="Fewer: ppo.max_step_kl ended the update.",
    ),
    Metric(
        "ppo/policy_grad_norm",
        "",
        "Norm of the policy's gradient before it is clipped to optim.max_grad_norm.",
        healthy="steady",
        otherwise="Growing: lower optim.learning_rate.",
    ),
    Metric(
        "ppo/value_grad_norm",
        "",
        "The same of the value model.",
        healthy="steady",
        otherwise="Growing: lower value_learning_rate.",
    ),
    Metric("ppo/learning_rate", "", "Learning rate of the policy.", healthy="follows its schedule"),
)

PTX = (
    Metric(
        "ppo/ptx_loss",
        "nats a token",
        "Mean cross entropy of the pretraining text; with ptx.targets reference the KL from the "
        "reference on that text. This metric and the next four are there only with ptx.coef above "
        "0.",
        healthy="falls or stays; the KL starts at 0 and rises little",
        otherwise="Rises: raise ptx.coef.",
        title="Pretraining loss",
    ),
    Metric(
        "ppo/ptx_coef",
        "",
        "Coefficient of the text's loss in this update. This metric and the next three also need "
        "ptx.gradient_norms or ptx.grad_norm_ratio.",
        healthy="ptx.coef, or what ptx.grad_norm_ratio asks for",
    ),
    Metric(
        "ppo/ptx_grad_norm",
        "",
        "Norm of the text's part of the policy's gradient, its coefficient included.",
        healthy="0.1 to 10 times ppo/ppo_grad_norm",
        otherwise="Choose ptx.coef by this ratio.",
    ),
    Metric(
        "ppo/ppo_grad_norm",
        "",
        "Norm of PPO's part of the policy's gradient.",
        healthy="steady",
    ),
    Metric(
        "ppo/grad_cosine",
        "",
        "Cosine of the angle between the two parts of the gradient.",
        healthy="around 0",
        otherwise="Clearly negative: the two work against each other, and one of them loses.",
    ),
)

SPEED = (
    Metric(
        "ppo/tokens_per_second",
        "tokens a second",
        "Prompt and response tokens of the update's episodes, each counted once, divided by the "
        "seconds of the update without evaluating and saving.",
        healthy="steady",
        otherwise="Falling: seconds/NAME says where. Longer responses alone change it little.",
        title="Speed",
    ),
    Metric(
        "ppo/model_flops_utilisation",
        "share of the rate",
        "FLOPs that the update's passes need (rlhf/measuring/flops.py; nothing is counted twice "
        "for checkpointing), divided by those seconds and by the machine's matrix rate. That rate "
        "is an estimate from a short product of the run's type at the start.",
        healthy="steady; 1 is the rate of a large product alone",
        otherwise="Small: raise micro_batch_tokens and generation.batch_size.",
    ),
    Metric(
        "ppo/alarms",
        "alarms",
        "Alarms of this update, each code counted once.",
        healthy="0",
        otherwise="Read alarms.jsonl.",
    ),
)

HELD_OUT = (
    Metric(
        "ppo/held_out_score",
        "score",
        "As ppo/score, on held-out prompts, with the same random draws each time. The four "
        "held-out metrics are there only with prompts_held_out.",
        healthy="rises with ppo/score",
        otherwise="Lags far behind: give more prompts.",
    ),
    Metric("ppo/held_out_kl", "nats a response", "As ppo/kl, on held-out prompts."),
    Metric("ppo/held_out_tokens", "tokens", "As ppo/response_tokens, on held-out prompts."),
    Metric("ppo/held_out_eos_rate", "share of responses", "As ppo/eos_rate, on held-out prompts."),
)

METRICS = (*ROLLOUT, *SAMPLER_CHECK, *UPDATE, *PTX, *SPEED, *HELD_OUT)

SECONDS = (
    Metric("seconds/update", "seconds", "Wall time of the whole update."),
    Metric("seconds/rollout", "seconds", "Sampling."),
    Metric("seconds/score", "seconds", "The reward."),
    Metric("seconds/logprobs", "seconds", "The policy's pass over the responses."),
    Metric("seconds/reference", "seconds", "The reference's pass over the responses."),
    Metric("seconds/value", "seconds", "The value model's pass over the responses."),
    Metric("seconds/advantages", "seconds", "The KL penalty, and what follows from it."),
    Metric("seconds/metrics", "seconds", "The metrics of the rollout."),
    Metric("seconds/ptx", "seconds", "Forward and backward pass of the text."),
    Metric("seconds/train", "seconds", "Forward and backward pass of policy and value loss."),
    Metric("seconds/step", "seconds", "Norms, clipping and the optimizer."),
    Metric("seconds/evaluate", "seconds", "The regular evaluation on held-out prompts."),
    Metric("seconds/save", "seconds", "The checkpoint that the update before wrote."),
)
"""Phases of an update, on the first process."""

ALARMS = (
    Alarm(
        "PPO_REFERENCE",
        "Before the first update policy and reference give different log-probabilities to the same "
        "tokens.",
        "The two were loaded from different folders or in different dtypes, or dropout is on.",
        "Load both from one folder in one dtype, with dropout off.",
    ),
    Alarm(
        "PPO_SAMPLER",
        "Sampler and trainer differ on the log-probabilities of sampled tokens by more than "
        "rounding. Or the tokens are likelier, or less likely, than the trainer's distribution "
        "says, whatever the sampler reports.",
        "Top-k, top-p, another temperature, or stale weights in the sampler.",
        "Sample at rollout.temperature without top-k, top-p or penalties, from the weights that "
        "are scored.",
    ),
    Alarm(
        "PPO_NEG_KL",
        "The mean KL is below 0 by several standard errors, which a true KL never is.",
        "Sampler, scorer and reference do not compute the same distribution.",
        "Look for what makes sampler, scorer or reference differ: temperature, filters, dtype, "
        "tokens after the end.",
    ),
    Alarm(
        "PPO_KL",
        "The KL is over monitor.max_kl nats a response.",
        "The penalty is small against the reward, and the policy exploits the reward model.",
        "Raise ppo.kl_coef, lower optim.learning_rate, or stop earlier: gold quality usually falls "
        "long before.",
    ),
    Alarm(
        "PPO_NO_EOS",
        "A smaller share of responses ends by itself than monitor.min_eos_rate.",
        "The responses need more tokens than they may have, or SFT never taught the end token.",
        "Raise rollout.max_new_tokens, charge reward.missing_end, or train SFT on responses with "
        "their end token.",
    ),
    Alarm(
        "PPO_LENGTH",
        "The mean length changed since the first update by more than the factor "
        "monitor.max_length_change.",
        "The reward pays for length, or for shortness.",
        "Read samples.jsonl: the reward may love length or shortness; raise ppo.kl_coef or set a "
        "length penalty.",
    ),
    Alarm(
        "PPO_REPEAT",
        "The share of different bigrams fell below monitor.min_distinct times that of the first "
        "update.",
        "The reward model never saw repetition lose.",
        "Read samples.jsonl, raise ppo.kl_coef and train the reward model on such responses too.",
    ),
    Alarm(
        "PPO_ONE_ANSWER",
        "One response, word for word, goes to a larger share of the prompts than "
        "monitor.max_one_answer in the mean of the last updates, and its odds have more than "
        "tripled since the first update.",
        "The reward model likes that answer whatever is asked.",
        "Read samples.jsonl, raise ppo.kl_coef, and train the reward model on pairs in which such "
        "an answer loses.",
    ),
    Alarm(
        "PPO_ZERO_ADV",
        "All scores, or all advantages, of the update are equal.",
        "The reward is too coarse, or every prompt is always or never solved.",
        "Give a reward that tells responses apart, or prompts that are neither always nor never "
        "solved.",
    ),
    Alarm(
        "PPO_RATIO",
        "In the first step on a rollout the ratio of new to old probabilities is not 1.",
        "The training pass does not compute what the rollout computed.",
        "Make rollout and training pass alike: dropout off, one dtype, one temperature, no weights "
        "changed in between.",
    ),
    Alarm(
        "PPO_CLIP",
        "A larger share of tokens is clipped than monitor.max_clip_fraction.",
        "The steps are too long, or there are too many on one rollout.",
        "Lower optim.learning_rate or ppo.num_epochs.",
    ),
    Alarm(
        "PPO_UPDATE_KL",
        "Within one update the policy moved further than monitor.max_update_kl.",
        "The steps are too long, or there are too many on one rollout.",
        "Lower optim.learning_rate or ppo.num_epochs, or set ppo.max_step_kl.",
    ),
    Alarm(
        "PPO_VALUE",
        "The value loss is monitor.max_value_loss_growth times the median of the updates before, "
        "or more.",
        "The value model's steps are too long, or the scores jumped.",
        "Lower value_learning_rate, and look whether scores jumped (ppo/score_std).",
    ),
    Alarm(
        "PPO_VALUE_CLIP",
        "The error of the value model is more than monitor.max_value_error times "
        "ppo.value_clip_range, which is all that a value may move in an update.",
        "The scores have a larger scale than the clip range was made for.",
        "Raise ppo.value_clip_range or set it to null, or bring scores to unit variance "
        "(reward.normalize_on).",
    ),
    Alarm(
        "PPO_RM_CHANCE",
        "The reward model may be no better than a coin, and reward.allow_chance_reward let it "
        "through.",
        "It was trained on too few rankings, or on rankings that disagree.",
        "Train the reward model on more rankings: optimising noise makes the policy worse.",
    ),
    Alarm(
        "PPO_NONFINITE",
        "A value is NaN or infinite. The message names the tensor, the phase and the prompt, and "
        "nonfinite.json holds the row.",
        "The steps are too long, or the weights' dtype has too small a range.",
        "Lower the learning rates, hold the weights in float32, and look at the prompt in "
        "nonfinite.json.",
    ),
)
