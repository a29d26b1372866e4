"""Make prompts with instructions that a program can check, and the rule reward that checks them.

The instructions are modelled on IFEval (Zhou et al. 2023). They are easy enough for a small model
with few tokens to follow sometimes.

    checks.py       one function for each kind of instruction, and `follows`, the reward
    templates.py    instructions in words, added after public prompts
    ifeval.py       IFEval's own prompts whose instructions these checks know
    build.py        the program: `python -m data.instructions --output_dir FOLDER`

Programs name them in their settings: `data.instructions:follows` is a reward for PPO, and
`data.instructions:make_gold` makes a judge for the evaluation. If some prompts of a file have no
instructions, give the reward's part `only_with: instructions`.
"""

from data.instructions.checks import follows, make_gold

__all__ = ["follows", "make_gold"]
