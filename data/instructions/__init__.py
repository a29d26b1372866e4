"""Prompts with instructions that a program can check, and the rule reward that checks them.

After IFEval (Zhou et al. 2023), at a size that a small model with few tokens can sometimes meet:

    checks.py       one function a kind of instruction, and `follows`, the reward
    templates.py    instructions in words, put behind public prompts
    ifeval.py       IFEval's own prompts, those of them that these checks know
    build.py        the program: `python -m data.instructions --output_dir FOLDER`

Programs take them by name: `data.instructions:follows` (a reward of PPO) and
`data.instructions:make_gold` (a judge of the evaluation).
"""

from data.instructions.checks import follows, make_gold

__all__ = ["follows", "make_gold"]
