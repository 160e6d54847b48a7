# make train   sets up a virtual environment, trains SpikEmo on MELD and prints the scores
# make test    sets up the same environment, then lint, types and all tests
#
# PYTHON=python3.12 chooses the interpreter, VENV=.venv the place, ARGS="--seeds 3" the options of the training.
PYTHON ?= python3
VENV ?= .venv
ARGS ?=

BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: train test clean

train: $(READY)
	$(BIN)/python examples/train_meld.py $(ARGS)

# A process a core, of one thread each: workers that each take all cores wait for each other.
test: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --maxprocesses=8 --dist worksteal

# A torchvision that was built for another torch fails at import, and torchmetrics and lightning with it. Nothing
# here needs it, so one that cannot be imported is removed; the same for torchaudio.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "error: Python 3.11 or newer is needed; set PYTHON=")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[spikemo,features,test,dev]"
	for name in torchvision torchaudio; do \
	  $(BIN)/python -c "import $$name" 2>/dev/null || $(BIN)/python -m pip uninstall --quiet --yes $$name; \
	done
	touch $@

clean:
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
