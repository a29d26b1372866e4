# The default: a world made from a seed, a base model pretrained on it, and rankings collected.
BEFORE_SFT := pretrain
BEFORE_RM := collect
SIDE_BY_SIDE := 2
PLAN = "The tiny world, seed $(or $(SEED),0): data, a base model, SFT, rankings, a reward model, PPO and PPO-ptx" \
	"side by side, evaluation. Two to six minutes on two cores after the set-up; results in $(RUN)."

data: | $(SETUP)
	$(python) data.tinyworld --output_dir $(RUN)/data --overwrite$(if $(SEED), --seed $(SEED))$(if $(SIZES), $(SIZES))
