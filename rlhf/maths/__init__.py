"""The maths of RLHF: tensors in, tensors out. Imports torch and this folder only.

masking.py       means, variances and whitening over the tokens that count
logprobs.py      log-probabilities of the tokens that were sampled
kl.py            KL divergence from the reference policy, as penalty and as meter
advantages.py    generalised advantage estimation
losses.py        losses of the reward model and of PPO
"""
