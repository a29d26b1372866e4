"""PPO and PPO-ptx (Ouyang et al. 2022, section 3.5 and eq. 2).

The stage reads the SFT policy (start and KL reference), the reward model, prompts and pretraining
text. It writes the aligned policy as a plain model folder. An update samples responses, scores
them, subtracts the KL penalty, estimates advantages and takes clipped steps. Each step adds the
gradient of the language modelling loss on pretraining text.
"""
