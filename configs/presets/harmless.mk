# Real weights and people's comparisons of harmless answers. One half of the pairs trains the reward
# model, the other half the judge (configs/rm/harmless_judge.yaml).
SHARED := runs/smollm2
include configs/presets/smollm2.mk
POLICIES := ppo ppo-ptx judge
PLAN = "SmolLM2-135M on Anthropic's harmless pairs: SFT, a reward model, PPO, PPO-ptx, and a judge from other pairs." \
	"About six hours on two cores after the set-up; results in $(RUN)."

.PHONY: judge smollm2-data
data: smollm2-data
	$(python) data.instructions --output_dir $(RUN)/instructions --overwrite$(if $(SEED), --seed $(SEED))
	$(python) data.harmless --instructions $(RUN)/instructions --output_dir $(RUN)/data --overwrite$(if $(SEED), --seed $(SEED))
judge: $(call after,data) | $(SETUP)
	$(launch) stages.rm --config configs/rm/harmless_judge.yaml --run_dir $(RUN) $(strip $(options))
