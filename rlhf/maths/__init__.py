"""The maths of RLHF: tensors in, tensors out. Imports only torch and this folder.

masking.py       sums and whitening over the tokens that count
logprobs.py      log-probabilities of sampled tokens
kl.py            KL divergence from the reference policy, as penalty and for the log
advantages.py    generalised advantage estimation
losses.py        losses of the reward model and of PPO
"""
