# Summaries without a pretraining mix. configs/sft/pythia_1b_tldr.yaml says how model and data get
# into $(RUN).
POLICIES := ppo
