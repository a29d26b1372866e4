"""Say what the warnings of the evaluation mean."""

from rlhf.runs.glossary import Alarm

ALARMS = (
    Alarm(
        "EVAL_PARTS",
        "The policy gains by one part of the score and loses by another. The parts are those of "
        "`gold`, and the scores of `reward_model` and `judges`.",
        "The parts are traded for each other.",
        "Look at the parts one by one: their sum hides the loss.",
    ),
    Alarm(
        "EVAL_ONE_ANSWER",
        "One response, word for word, goes to more than 10 % of the different prompts, and its "
        "odds are more than three times those of the baseline.",
        "The reward model likes that answer whatever is asked.",
        "Read samples.md, raise ppo.kl_coef, and train the reward model on such answers too.",
    ),
    Alarm(
        "EVAL_REWARD",
        "The score of `reward_model` rises, and an independent judge falls, or does not rise "
        "beyond its interval. The judges are `gold`, its part right_part, and each of `judges`.",
        "The policy learned to please the reward model alone.",
        "Train the reward model on this policy's answers, raise ppo.kl_coef, or stop earlier.",
    ),
    Alarm(
        "EVAL_LENGTH",
        "The policy gains by a judge, and at equal length the gain is not beyond its interval. A "
        "straight line through the gains of all prompts shows it: its height where a response is "
        "as long as the baseline's.",
        "Judges often like long or short answers as such, and the policy learned that.",
        "Set reward.debias_length, and read samples.md.",
    ),
)
