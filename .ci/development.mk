# For those who change the code: virtual environments, checks, tests and benchmarks.

PYTHON ?= python3

.PHONY: check quick test test-all test-resume test-interop test-lowest test-newest bench bench-scaling bench-roofline gpu-check

# PYTHONWARNINGS hides what setuptools tells packagers about editable installs. Each environment takes the newest pip
# first: that of Python 3.11 takes three times as long to choose versions.
install = PYTHONWARNINGS=ignore $(@D)/bin/python -m pip install --quiet

# --no-compile: Python compiles the files that it imports, which are few of 20,000.
.venv/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("error: Python 3.11 or later is needed; make PYTHON=python3.12 names one")'
	@echo "making .venv, which takes about 2 GB and some minutes"
	$(PYTHON) -m venv .venv
	$(install) --upgrade pip
	$(install) --no-compile --constraint constraints.txt --editable ".[dev]"
	@touch $@

.venv-%/.installed: pyproject.toml .ci/ranges.py | .venv/.installed
	$(PYTHON) -m venv --clear $(@D)
	$(install) --upgrade pip
	$(BIN)/python .ci/ranges.py $* > $(@D)/constraints.txt
	$(install) --constraint $(@D)/constraints.txt --editable ".[dev]"
	@touch $@

.venv-peers/.installed: benchmarks/peers.txt
	$(PYTHON) -m venv .venv-peers
	$(install) --upgrade pip
	$(install) --requirement $<
	@touch $@

.venv-interop/.installed: tests/interop/constraints.txt
	$(PYTHON) -m venv --clear $(@D)
	$(install) --upgrade pip
	$(install) --constraint $< torch transformers peft
	@touch $@

check: $(SETUP) ## Format, lint, types and import rules; no network, no accelerator.
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy --num-workers $(cores)
	$(BIN)/lint-imports

# The tests of a file stay in one process, since they share what they set up, which may take minutes. Files keep
# their order: xdist would start those with few tests last, and some of these take longest.
pytest := OMP_NUM_THREADS=1 $(BIN)/pytest -n $(cores) --dist loadfile --no-loadscope-reorder
UNIT_TESTS := tests/test_*.py $(addprefix tests/,rlhf data tools benchmarks experiments examples)

quick: $(SETUP) ## Unit tests.
	$(pytest) -m "not slow and not long" $(UNIT_TESTS)

test: check ## Checks, then all tests that CI runs.
	$(pytest) -m "not long"

test-all: check ## Checks, then all tests, also the long ones.
	$(pytest)

test-resume: $(SETUP) ## Kill runs at KILLS random moments (30) and compare; about five minutes.
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.long.kill_points --kill-points $(or $(KILLS),30)

test-interop: $(SETUP) .venv-interop/.installed ## Every stage's folder, read by transformers 4.57 too.
	OMP_NUM_THREADS=1 $(BIN)/pytest tests/interop/old_readers.py

test-lowest: .venv-lowest/.installed ## All tests on the lowest versions that pyproject.toml declares.
test-newest: .venv-newest/.installed ## All tests on the newest versions that it allows.
test-lowest test-newest: test-%:
	OMP_NUM_THREADS=1 .venv-$*/bin/python -m pytest -n $(cores)

bench: $(SETUP) .venv-peers/.installed ## Speed and memory against TRL, alternately; ARGS=--quick for a first look.
	$(BIN)/python -m benchmarks $(ARGS)

bench-scaling: $(SETUP) ## Our cost over K, batch, length, ptx ratio and model size.
	$(BIN)/python -m benchmarks.scaling $(ARGS)

bench-roofline: $(SETUP) ## How close each phase comes to what the machine can do.
	$(BIN)/python -m benchmarks.roofline $(ARGS)

gpu-check: $(SETUP) ## What only a GPU can show, in nine minutes; ARGS=--smoke tries the program on a CPU.
	$(BIN)/python -m benchmarks.gpu_check $(ARGS)
