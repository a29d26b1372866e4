# The embedded default: a world made from a seed, a base model pretrained on it, rankings collected.
PREPARED := $(RUN)/data/results.json
BASE := $(RUN)/base/results.json
RANKINGS := $(RUN)/rankings/results.json

$(RUN)/data/results.json: | $(SETUP)
	$(BIN)/python -m data.tinyworld --output_dir $(RUN)/data$(seed)
