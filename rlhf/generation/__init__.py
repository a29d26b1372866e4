"""Sampling responses: `generate`, or an engine that is kept from one rollout to the next.

All engines sample from the whole softmax at one temperature. There is no top-k, top-p or
repetition penalty: with one, the log-probabilities that PPO computes would not be those of the
policy that sampled (docs/recipe.md, mistake 12).

    settings.py        which engine samples, and how much at once
    interface.py       what every engine is asked, and what it gives
    engines.py         the engine that the settings name
    hf.py              our own loop over the model's cache
    decoder.py         the model's step of one token, as fast as it goes on a CPU
    cpu_products.py    products of linear layers turned round for a few rows
    continuous.py      continuous batching of transformers
    vllm.py            vLLM on the GPU that trains
    auto.py            the faster of two engines, timed on the first prompts
"""
