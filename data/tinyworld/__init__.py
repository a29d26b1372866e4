"""The tiny world: a whole RLHF data set made from one seed, small enough for two cores.

No download and no account. It gives each stage what InstructGPT took from people and the web:

    text.py            plain text in which every fact of the world is told many times (pretraining)
    tasks.py           instructions of eight kinds, rendered from templates and parsed back
    demonstrations.py  responses of mixed quality, as people of mixed diligence write them (SFT)
    gold.py            the gold preference: what a perfect judge would say of (prompt, response)
    labelers.py        simulated labelers who see the gold through own weights and noise (RM)
    world.py           the people, things and secrets themselves

The gold preference simulates labelers and measures policies; the reward model never sees it.
Some people and things are told of in the plain text only: no instruction, demonstration or PPO
prompt names them. Whether a policy still knows them measures what alignment cost (`fact probe`).

Programs take the judges by name: `data.tinyworld:make_labelers`, `data.tinyworld:make_gold`.
"""

from data.tinyworld.gold import make_gold
from data.tinyworld.labelers import make_labelers
from data.tinyworld.world import World

__all__ = ["World", "make_gold", "make_labelers"]
