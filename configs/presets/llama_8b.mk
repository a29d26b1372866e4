# All weights on eight GPUs. configs/sft/llama_8b.yaml says how the data get into $(RUN)/data.
POLICIES := ppo-ptx
