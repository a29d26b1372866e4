# The recipe, from data to results. `make help` lists the targets.

PRESET ?= tiny
DEFAULT := configs/accelerate/default.yaml
ACCELERATE ?= $(DEFAULT)
RUN ?= runs/$(PRESET)$(if $(SEED),-seed$(SEED))
PYTHON ?= python3
ARGS ?=

STAGES := pretrain sft collect rm ppo ppo-ptx evaluate
BENCHMARKS := bench bench-scaling bench-roofline
BIN := .venv/bin
SETUP := .venv/.installed
PEERS := .venv-peers/.installed
PREPARED :=
BASE :=
RANKINGS :=
POLICIES := ppo ppo_ptx

# `~` is the home folder also where no shell reads it.
override RUN := $(patsubst ~/%,$(HOME)/%,$(RUN))
override ACCELERATE := $(patsubst ~/%,$(HOME)/%,$(ACCELERATE))

# A preset's file says where its data, base model and rankings come from. A preset without one
# brings its own: the paths in its YAML files are there already.
-include configs/presets/$(PRESET).mk

ifeq ($(wildcard $(ACCELERATE)),)
$(error ACCELERATE is $(ACCELERATE), which does not exist; one of $(wildcard configs/accelerate/*.yaml))
endif

# accelerate gives each process one thread unless told; this shares the cores out.
processes := $(or $(shell sed -n 's/^num_processes: *//p' $(ACCELERATE)),1)
cores := $(shell getconf _NPROCESSORS_ONLN)
export OMP_NUM_THREADS ?= $(shell echo $$(( $(cores) > $(processes) ? $(cores) / $(processes) : 1 )))
ifneq ($(shell grep -s '^use_cpu: *true' $(ACCELERATE)),)
export ACCELERATE_USE_CPU := true
endif

# Settings of a stage. A run in another folder, such as one of SEED=1, gets a copy with its paths.
settings = $(if $(filter runs/$(PRESET),$(RUN)),configs/$(1)/$(PRESET).yaml,$(RUN)/settings/$(1).yaml)

# ARGS are for the stages that are named on the command line. The ones that a result was made with
# lie beside it; others make it stale.
args = $(if $(filter $(1),$(MAKECMDGOALS)),$(ARGS))
# PPO and PPO-ptx share the cores where they go side by side, and only one shows its progress: two
# bars would write over each other.
beside = $(if $(findstring -j,$(MAKEFLAGS)),OMP_NUM_THREADS=$(share_of_cores)$(if $(1), $(1)))
share_of_cores = $(shell echo $$(( $(OMP_NUM_THREADS) > $(or $(SIDE_BY_SIDE),1) ? $(OMP_NUM_THREADS) / $(or $(SIDE_BY_SIDE),1) : 1 )))
quoted = '$(subst ','\'',$(1))'
made_with = $(shell cat $(RUN)/$(1)/make.args 2>/dev/null)
changed = $(or $(subst x$(1)x,,x$(2)x),$(subst x$(2)x,,x$(1)x))
other_args = $(if $(filter $(1),$(MAKECMDGOALS)),$(if $(call changed,$(strip $(ARGS)),$(call made_with,$(2))),anew))

# How a stage is run: with the YAML that is its rule's first prerequisite. What make finds stale is
# to be replaced.
# The launcher takes some seconds to start, which one process does not need; nor does a stage of a
# pipeline need to import anew what the one before it imported (stages/together.py).
one_process = $(filter $(DEFAULT),$(ACCELERATE))
alone = $(BIN)/python -m
launched = $(BIN)/accelerate launch --quiet --config_file $(ACCELERATE) -m
together = $(if $(RLHF_STAGES_TOGETHER),$(BIN)/python -S stages/ask.py,$(alone))
launch = $(if $(one_process),$(together),$(launched))
seed = $(if $(SEED), --seed $(SEED))
options = --config $< --overwrite$(seed)$(if $(2), $(2))$(if $(call args,$(1)), $(call args,$(1)))
note_args = @printf '%s\n' $(call quoted,$(strip $(call args,$(1)))) > $(RUN)/$(2)/make.args

ifneq ($(strip $(ARGS)),)
ifeq ($(filter $(STAGES) $(BENCHMARKS),$(MAKECMDGOALS)),)
$(error ARGS are for a stage or a benchmark: make sft ARGS="--optim.learning_rate 1e-5"; one of $(STAGES) $(BENCHMARKS))
endif
endif

.PHONY: help setup check test test-resume test-interop test-lowest test-newest pipeline quick-look clean anew $(STAGES)
.DELETE_ON_ERROR:

help: ## Show this list.
	@echo "make TARGET [PRESET=tiny] [SEED=1] [ACCELERATE=configs/accelerate/gpu.yaml] [ARGS=\"--key value\"]"
	@echo
	@sed -n 's/^\([a-z-]*\):.*## /  \1|/p' $(MAKEFILE_LIST) | awk -F'|' '{printf "%-16s%s\n", $$1, $$2}'

setup: $(SETUP) ## Make .venv with the tested versions of all packages.

check: $(SETUP) ## Format, lint, types and import rules; no network, no accelerator.
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: check ## Checks, then all tests.
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(cores)

test-resume: $(SETUP) ## Kill runs at KILLS random moments (30) and compare; about five minutes.
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.long.kill_points --kill-points $(or $(KILLS),30)

test-interop: $(SETUP) .venv-interop/.installed ## Every stage's folder, read by transformers 4.57 too.
	OMP_NUM_THREADS=1 $(BIN)/pytest tests/interop/old_readers.py

test-lowest: .venv-lowest/.installed ## All tests on the lowest versions that pyproject.toml declares.
test-newest: .venv-newest/.installed ## All tests on the newest versions that it allows.
test-lowest test-newest: test-%:
	OMP_NUM_THREADS=1 .venv-$*/bin/python -m pytest -n $(cores)

# A preset whose PPO runs may go side by side says how many in SIDE_BY_SIDE; they share the cores.
pipeline: ## All stages from the data to the table of results.
	$(if $(PLAN),@printf '%s\n' $(PLAN))
	@$(MAKE) --no-print-directory --question $(SETUP) 2>/dev/null || $(MAKE) --no-print-directory $(SETUP)
	@$(MAKE) --no-print-directory --question $(RUN)/results.json 2>/dev/null || $(if $(one_process),$(alone) stages.together) \
	    $(MAKE) --no-print-directory $(if $(SIDE_BY_SIDE),--jobs $(SIDE_BY_SIDE)) $(RUN)/results.json
	@echo "results: $(RUN)/results.json, answers side by side: $(RUN)/samples.md"

quick-look: ## The same chain in under a minute at a smaller size; nobody quotes its figures.
	@$(MAKE) --no-print-directory pipeline PRESET=quick

clean: ## Remove the preset's runs.
	rm -rf $(RUN)

.PHONY: $(BENCHMARKS)
bench: $(SETUP) $(PEERS) ## Speed and memory against TRL, alternately; ARGS=--quick for a first look.
	$(BIN)/python -m benchmarks $(ARGS)

bench-scaling: $(SETUP) ## Our cost over K, batch, length, ptx ratio and model size.
	$(BIN)/python -m benchmarks.scaling $(ARGS)

bench-roofline: $(SETUP) ## How close each phase comes to what the machine can do.
	$(BIN)/python -m benchmarks.roofline $(ARGS)

.venv-peers/.installed: benchmarks/peers.txt
	$(PYTHON) -m venv .venv-peers
	.venv-peers/bin/python -m pip install --quiet --requirement $<
	@touch $@

.venv-interop/.installed: tests/interop/constraints.txt
	$(PYTHON) -m venv --clear $(@D)
	$(@D)/bin/python -m pip install --quiet --constraint $< torch transformers peft
	@touch $@

.venv/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("error: Python 3.11 or later is needed; make PYTHON=python3.12 names one")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	@touch $@

.venv-%/.installed: pyproject.toml .ci/ranges.py | $(SETUP)
	$(PYTHON) -m venv --clear $(@D)
	$(BIN)/python .ci/ranges.py $* > $(@D)/constraints.txt
	$(@D)/bin/python -m pip install --quiet --constraint $(@D)/constraints.txt --editable ".[dev]"
	@touch $@

configs/%.yaml:
	@echo "error: $@ does not exist; write it, or name a PRESET that has one" >&2; exit 2

$(RUN)/settings/%.yaml: configs/%/$(PRESET).yaml
	@mkdir -p $(@D)
	sed 's|runs/$(PRESET)|$(RUN)|g' $< > $@

# ---- The recipe. Each line: what is made, from which settings and which earlier results.

pretrain: $(RUN)/base/results.json ## A small base model from plain text.
$(RUN)/base/results.json: $(call settings,pretrain) $(PREPARED) $(call other_args,pretrain,base) | $(SETUP)
	$(launch) stages.pretrain $(call options,pretrain)
	$(call note_args,pretrain,base)

sft: $(RUN)/sft/results.json ## A policy from demonstrations.
$(RUN)/sft/results.json: $(call settings,sft) $(PREPARED) $(BASE) $(call other_args,sft,sft) | $(SETUP)
	$(launch) stages.sft $(call options,sft)
	$(call note_args,sft,sft)

collect: $(RUN)/rankings/results.json ## Responses of that policy, ranked by labelers.
$(RUN)/rankings/results.json: $(call settings,collect) $(RUN)/sft/results.json $(call other_args,collect,rankings) | $(SETUP)
	$(launch) stages.collect $(call options,collect)
	$(call note_args,collect,rankings)

rm: $(RUN)/rm/results.json ## A reward model from the rankings.
$(RUN)/rm/results.json: $(call settings,rm) $(RUN)/sft/results.json $(RANKINGS) $(call other_args,rm,rm) | $(SETUP)
	$(launch) stages.rm $(call options,rm)
	$(call note_args,rm,rm)

ppo: $(RUN)/ppo/results.json ## The policy optimised against the reward model, without ptx.
$(RUN)/ppo/results.json: $(call settings,ppo) $(RUN)/rm/results.json $(call other_args,ppo,ppo) | $(SETUP)
	$(call beside,TQDM_DISABLE=1) $(launch) stages.ppo $(call options,ppo,--ptx.coef 0 --output_dir $(RUN)/ppo)
	$(call note_args,ppo,ppo)

ppo-ptx: $(RUN)/ppo_ptx/results.json ## The same with the pretraining mix: PPO-ptx.
$(RUN)/ppo_ptx/results.json: $(call settings,ppo) $(RUN)/rm/results.json $(call other_args,ppo-ptx,ppo_ptx) | $(SETUP)
	$(beside) $(launch) stages.ppo $(call options,ppo-ptx)
	$(call note_args,ppo-ptx,ppo_ptx)

evaluate: $(RUN)/results.json ## All policies side by side on held-out prompts.
$(RUN)/results.json: $(call settings,evaluate) $(POLICIES:%=$(RUN)/%/results.json) $(call other_args,evaluate,.) | $(SETUP)
	$(launch) stages.evaluate $(call options,evaluate)
	$(call note_args,evaluate,.)
