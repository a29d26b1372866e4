"""Make the tiny world: a whole RLHF data set from one seed, small enough for two cores.

The tiny world needs no download and no account. It gives each stage what InstructGPT took from
people and the web:

    text.py            plain text that states every fact of the world many times (pretraining)
    tasks.py           instructions of eight kinds, rendered from templates and parsed back
    demonstrations.py  responses of mixed quality, as people of mixed diligence write them (SFT)
    gold.py            the gold preference: what a perfect judge would say of (prompt, response)
    labelers.py        simulated labelers, who add their own weights and noise to the gold (RM)
    world.py           the people, things and secrets themselves

The gold preference simulates labelers and measures policies; the reward model never sees it. Some
people and things are named in the plain text only: no instruction, demonstration or PPO prompt
names them. Whether a policy still knows them measures what alignment cost (`fact probe`).

Settings name the judges as `data.tinyworld:make_labelers` and `data.tinyworld:make_gold`.
"""

from data.tinyworld.gold import make_gold
from data.tinyworld.labelers import make_labelers
from data.tinyworld.world import World

__all__ = ["World", "make_gold", "make_labelers"]
