# The recipe, from data to results. `make help` lists the targets.

PRESET ?= tiny
RUN ?= runs/$(PRESET)$(if $(SEED),-seed$(SEED))
DEFAULT := configs/accelerate/default.yaml
ACCELERATE ?= $(DEFAULT)
BIN := .venv/bin
SETUP := .venv/.installed
POLICIES := ppo ppo-ptx
cores := $(shell getconf _NPROCESSORS_ONLN)
.DEFAULT_GOAL := help
# Containers often forbid it. Without bytecode every process compiles for ten seconds what it imports.
export PYTHONDONTWRITEBYTECODE :=

# A preset's file says where data, base model and rankings come from, and what runs side by side. A
# preset without one brings its own: the paths in its YAML files are there already.
-include configs/presets/$(PRESET).mk
include .ci/development.mk

$(if $(wildcard $(ACCELERATE)),,$(error ACCELERATE is $(ACCELERATE), which does not exist; one of \
  $(wildcard configs/accelerate/*.yaml)))
$(if $(and $(ARGS),$(filter pipeline quick-look,$(MAKECMDGOALS))),$(error ARGS are for one stage, as \
  in: make sft ARGS="--optim.learning_rate 1e-5"))

.PHONY: help setup pipeline quick-look clean data pretrain sft collect rm ppo ppo-ptx evaluate benchmark

help: ## Show this list.
	@echo "make TARGET [PRESET=tiny] [SEED=1] [ACCELERATE=configs/accelerate/gpu.yaml] [ARGS=\"--key value\"]"
	@echo
	@sed -n 's/^\([a-z-]*\):.*## /  \1|/p' $(MAKEFILE_LIST) | awk -F'|' '{printf "%-18s%s\n", $$1, $$2}'

setup: $(SETUP) ## Make .venv with the tested versions of all packages.

# ---- The recipe. Each line: the stage, what it needs, what is run.

# A stage says by itself whether its results are up to date. A stage that is named asks only for what
# it needs and is not there; a pipeline asks every stage.
folders := pretrain/base collect/rankings ppo-ptx/ppo_ptx
results = $(wildcard $(RUN)/$(or $(patsubst $(1)/%,%,$(filter $(1)/%,$(folders))),$(1))/results.json)
after = $(if $(ALL),$(1),$(foreach stage,$(1),$(if $(call results,$(stage)),,$(stage))))

# One process needs no launcher, which takes seconds to start. In a pipeline it imports what all stages
# need only once (stages/stage_server.py).
one_process = $(filter $(DEFAULT),$(ACCELERATE))
ifdef RLHF_STAGE_SERVER
.SILENT: # the client prints the command that a person would type
endif
python = $(BIN)/python $(if $(RLHF_STAGE_SERVER),-S stages/stage_client.py,-m)
launch = $(if $(one_process),$(python),$(BIN)/accelerate launch --quiet --config_file $(ACCELERATE) -m)
options = --overwrite$(if $(SEED), --seed $(SEED))$(if $(filter $@,$(MAKECMDGOALS)), $(ARGS))
run = $(launch) stages.$(1) --config configs/$(1)/$(PRESET).yaml --run_dir $(RUN) $(strip $(2) $(options))

# Runs side by side share the cores, and one shows its progress: two bars would overwrite each other.
jobs = $(if $(one_process),$(SIDE_BY_SIDE))
share = $$(( ($(or $(OMP_NUM_THREADS),$(cores)) + 1) / $(jobs) ))
beside = $(if $(and $(ALL),$(jobs)),OMP_NUM_THREADS=$(share)$(if $(1), $(1)) )

pretrain: $(call after,data) | $(SETUP) ## A small base model from plain text.
	$(call run,pretrain)
sft: $(call after,$(BEFORE_SFT)) | $(SETUP) ## A policy from demonstrations.
	$(call run,sft)
collect: $(call after,sft) | $(SETUP) ## Responses of that policy, ranked by labelers.
	$(call run,collect)
rm: $(call after,sft $(BEFORE_RM)) | $(SETUP) ## A reward model from the rankings.
	$(call run,rm)
ppo: $(call after,rm) | $(SETUP) ## The policy optimised against the reward model, without ptx.
	$(call beside,TQDM_DISABLE=1)$(call run,ppo,--ptx.coef 0 --output_dir $(RUN)/ppo)
ppo-ptx: $(call after,rm) | $(SETUP) ## The same with the pretraining mix: PPO-ptx.
	$(call beside)$(call run,ppo)
evaluate: $(call after,$(POLICIES)) | $(SETUP) ## All policies side by side on held-out prompts.
	$(call run,evaluate)
benchmark: $(call after,$(POLICIES)) | $(SETUP) ## Zero-, one- and few-shot tasks, and what alignment cost.
	$(call run,benchmark)

pipeline: ## All stages from the data to the table of results.
	$(if $(PLAN),@printf '%s\n' $(PLAN))
	@$(MAKE) --silent $(SETUP)
	@started=$$(date +%s); $(if $(one_process),$(BIN)/python -m stages.stage_server )$(MAKE) --no-print-directory \
	    $(if $(jobs),--jobs $(jobs) )ALL=1 evaluate && echo "done in $$(($$(date +%s) - started)) s;" \
	    "report: $(RUN)/report.html, results: $(RUN)/results.json, answers side by side: $(RUN)/samples.md"

quick-look: ## The same chain in under a minute at a smaller size; nobody quotes its figures.
	@$(MAKE) --no-print-directory pipeline PRESET=quick

clean: ## Remove the preset's runs.
	rm -rf $(RUN)
