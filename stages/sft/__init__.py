"""Fine-tune a base model on demonstrations, so that it answers prompts.

The stage reads `demonstration` records and, to mix in, `text` records. It writes a plain Hugging
Face folder that collect, rm and ppo start from. The loss counts the response and its end token,
never the prompt.

    rows.py      turns records into token ids; counts what was cut or dropped
    trainer.py   TRL's SFTTrainer on these ids; only it and compat.py know TRL
    compat.py    the insides of TRL that the stage must know
    resume.py    our checkpoints under its Trainer
    measure.py   held-out losses and samples
    glossary.py  what each metric means
    train.py     the stage from start to end
"""
