# Adapters in all stages on one GPU. configs/sft/llama_1b.yaml says how the data get into
# $(RUN)/data.
POLICIES := ppo-ptx
