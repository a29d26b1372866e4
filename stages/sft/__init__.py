"""Supervised fine-tuning: a policy that answers, from a base model and demonstrations.

Reads `demonstration` records and, mixed in, `text` records; writes a plain Hugging Face folder that
collect, rm and ppo start from. Only the response and its end token are trained, never the prompt.

    rows.py      records -> token ids, with what was cut or dropped
    trainer.py   TRL's SFTTrainer on these ids; the only module that knows TRL
    measure.py   held-out losses and samples
    train.py     the stage from start to end
"""
