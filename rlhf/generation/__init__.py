"""Samples responses, once (`generate`) or with an engine that a run keeps.

All engines sample from the whole softmax at one temperature. There is no top-k, top-p or
repetition penalty: with one, the log-probabilities that PPO computes would not be those of the
policy that sampled (docs/recipe.md, mistake 12).

    settings.py        which engine samples, and how many responses at once
    interface.py       what every engine takes and returns
    engines.py         the engine that the settings name
    answers.py         one record for a sampled response, which rewards and figures take
    hf.py              our own loop over the model's cache
    decoder.py         a model's step of one token, as fast as that model allows
    half_weights.py    weights in bf16 while they sample under autocast
    cpu_products.py    linear layers transposed for a few rows on the CPU
    vllm.py            vLLM on the GPU that trains
"""
