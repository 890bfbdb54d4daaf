# Everything runs in .venv inside the checkout; PYTHON is only what makes that environment.
#   make setup PYTHON=python3.12      another interpreter
#   make test ARGS="-k routing -x"    arguments for pytest
#   make test-torch TORCH=2.11.0      another torch, in an environment of its own
# pip keeps its ordinary configuration. Where an index or folder offers a CPU build of torch, pip
# prefers it (2.13.0+cpu is newer than 2.13.0 to it): point PIP_FIND_LINKS or PIP_EXTRA_INDEX_URL there.
PYTHON ?= python3
ARGS ?=

VENV := .venv
LOCK := requirements.lock
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := PIP_DISABLE_PIP_VERSION_CHECK=1 $(BIN)/python -m pip install -qq
# The tests' ranks share the machine: one thread each, and the CPU even where there is a GPU.  Two files of tests at a time,
# since much of a test is ranks that start or wait for each other; in their order, or one of few and long tests would come last, alone.
TEST_ENV = OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} DS_ACCELERATOR=$${DS_ACCELERATOR:-cpu}

.PHONY: help setup demo cards fashion fashion-demo docs lint test test-all test-torch check-torch test-operators test-slow test-slurm clean

help:
	@echo "make demo       train, sample and score a small model on this machine, 2 ranks, no download"
	@echo "make cards      score cards of the demo's model: two capacities, two routing rules (minutes)"
	@echo "make fashion    Fashion-MNIST (Debian's package, 31 MB) as shards in data/fashion; FASHION=PLACE has it already"
	@echo "make fashion-demo  the second demo: clothing by class at 28 x 28; trains for the better part of an hour"
	@echo "make docs       the pages of docs/ as a site in site/; a dead link is an error"
	@echo "make lint       ruff and mypy over the tree, as pyproject.toml says"
	@echo "make test       the core of the tests, minutes"
	@echo "make test-all   these and the rest, as .ci/run asks"
	@echo "make test-slow  those that need more time or more tools than .ci/run has"
	@echo "make test-torch TORCH=2.11.0  what depends on torch, with another torch in an environment of its own"
	@echo "make test-slurm the job scripts under a real Slurm, which they start on this machine"
	@echo "make setup      $(VENV) with everything in requirements.lock (the others do this first)"
	@echo "make clean      remove build outputs and caches; keeps $(VENV) and runs/"

setup: $(STAMP)

$(BIN)/pip:
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; (3, 10) <= v < (3, 14) or sys.exit("PYTHON ($(PYTHON)) is %d.%d: diffmoe needs >=3.10,<3.14" % v)'
	@echo "setup: $(VENV)"
	@$(PYTHON) -m venv $(VENV)

# torch comes first, with what it needs (a CUDA build: NVIDIA's packages), and nothing is built in isolation: deepspeed's set-up looks
# at the torch it will run with, and an isolated build would fetch its own tools (or a second torch).  The lock is complete.
$(STAMP): $(LOCK) pyproject.toml | $(BIN)/pip
	@echo "setup: torch and build tools"
	@$(PIP) $$(grep -E '^(torch|setuptools|wheel)[=>]' $(LOCK))
	@echo "setup: $(LOCK)"
	@$(PIP) --no-build-isolation --no-deps -r $(LOCK)
	@echo "setup: diffmoe"
	@$(PIP) --no-build-isolation --no-deps -e .
	@touch $@

demo: setup
	@PATH="$(CURDIR)/$(BIN):$$PATH" bash scripts/demo.sh

cards: demo
	@PATH="$(CURDIR)/$(BIN):$$PATH" bash scripts/cards.sh

fashion: setup
	@PATH="$(CURDIR)/$(BIN):$$PATH" bash scripts/fashion.sh

fashion-demo: setup
	@PATH="$(CURDIR)/$(BIN):$$PATH" bash scripts/fashion_demo.sh

docs: setup
	@$(BIN)/mkdocs build -q

lint: setup
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check --quiet
	@$(BIN)/mypy

test: setup
	@$(TEST_ENV) $(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

test-all: test
	@$(TEST_ENV) $(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder -m full $(ARGS)

# Another torch, in an environment of its own: the lock but for its torch, and for the setuptools that this torch wants.
# Its tests: the parity table's quick rows, and whatever calls an operator, a collective or Inductor.
OTHER := .venv-torch-$(subst *,x,$(TORCH))
OPERATOR_TESTS := $(addprefix tests/test_,$(addsuffix .py,cuda_paths fast_paths moe_parallel pools parity precision \
  gradient_sums optimizer_traffic groups checkpoint checkpoint_format old_checkpoint compile))

test-torch: check-torch $(OTHER)/requirements.lock
	@$(MAKE) --no-print-directory VENV=$(OTHER) LOCK=$(OTHER)/requirements.lock test-operators

check-torch:
	@test -n "$(TORCH)" || { echo "TORCH is not set; try: make test-torch TORCH=2.11.0" >&2; exit 2; }

$(OTHER)/requirements.lock: requirements.lock
	@mkdir -p $(@D)
	@sed -e 's/^torch==.*/torch==$(TORCH)/' -e 's/^setuptools==.*/setuptools>=77.0.3/' $< > $@

test-operators: setup
	@$(BIN)/python -c 'import platform, torch; print("torch", torch.__version__, "Python", platform.python_version())'
	@$(TEST_ENV) $(BIN)/python run.py verify --quick
	@$(TEST_ENV) $(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder -m "not slow and not slurm" $(OPERATOR_TESTS) $(ARGS)

test-slow: setup
	@$(TEST_ENV) $(BIN)/python -m pytest -q -m slow $(ARGS)

test-slurm: setup
	@$(TEST_ENV) $(BIN)/python -m pytest -q -m slurm $(ARGS)

clean:
	@rm -rf build dist *.egg-info .pytest_cache
	@find . -name __pycache__ -type d -not -path './.venv*/*' -prune -exec rm -rf {} +
