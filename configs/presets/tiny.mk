# The embedded default: a world made from a seed, a base model pretrained on it, rankings collected.
PREPARED := $(RUN)/data/results.json
BASE := $(RUN)/base/results.json
RANKINGS := $(RUN)/rankings/results.json
SIDE_BY_SIDE := 2
PLAN := "The tiny world, seed $(or $(SEED),0): data, a base model, SFT, rankings, a reward model, PPO and PPO-ptx" \
	"side by side, evaluation. About five minutes on two cores after the set-up; results in $(RUN)."

$(RUN)/data/results.json: | $(SETUP)
	$(together) data.tinyworld --output_dir $(RUN)/data --overwrite$(seed)$(if $(SIZES), $(SIZES))
