"""PPO and PPO-ptx (Ouyang et al. 2022, section 3.5 and eq. 2).

Reads the SFT policy (start and KL reference), the reward model, prompts and pretraining text;
writes the aligned policy as a plain model folder. One update is: sample responses, score them,
subtract the KL penalty, estimate advantages, and take clipped steps into which the gradient of the
language modelling loss on pretraining text is summed.
"""
