# Two commands do everything on a fresh machine with Python 3.11 or newer:
#   make demo   shows the codec at work on the model that ships with it
#   make test   runs every check
# make test-engines runs kvtc inside serving engines; each takes some minutes and some GB to install.
VENV ?= .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

# Engines that `make test-engines` runs kvtc in, each in an environment of its own.
ENGINES ?= vllm

.PHONY: demo test check fuzz bench clean test-engines

demo: $(VENV)/.demo-ready
	$(BIN)/kvtc demo --output demo_output --force

test: check
	$(BIN)/python -m pytest -n 2

check: $(VENV)/.test-ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test-engines: $(ENGINES:%=test-engine-%)

test-engine-%:
	tests/engines/setup.sh $* $(VENV)-$*
	$(VENV)-$*/bin/python tests/engines/$*_end_to_end.py

fuzz: $(VENV)/.test-ready
	$(BIN)/python -m tests.fuzz --mutations 100000

bench: $(VENV)/.test-ready
	$(BIN)/python benchmarks/allocation.py
	$(BIN)/python benchmarks/calibration.py
	$(BIN)/python benchmarks/codec.py

# PyTorch goes first: what depends on it then takes the pinned build as it is.
$(VENV)/.torch-ready: constraints.txt
	python3 -m venv $(VENV)
	$(INSTALL) torch==2.13.0
	touch $@

$(VENV)/.demo-ready: $(VENV)/.torch-ready pyproject.toml
	$(INSTALL) --editable '.[demo]'
	touch $@

$(VENV)/.test-ready: $(VENV)/.torch-ready pyproject.toml
	$(INSTALL) --editable '.[dev]'
	touch $(VENV)/.demo-ready $@

clean:
	rm -rf $(VENV) $(ENGINES:%=$(VENV)-%) demo_output .pytest_cache .mypy_cache .ruff_cache .hypothesis
