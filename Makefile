# Two commands do everything on a fresh machine with Python 3.11 or newer:
#   make demo   shows the codec at work on the model that ships with it
#   make test   runs every check
# make test-engines runs kvtc inside serving engines; each takes some minutes and some GB to install.
VENV ?= .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

# Engines that `make test-engines` runs kvtc in, each in an environment of its own.
ENGINES ?= vllm lmcache sglang transports

.PHONY: demo test test-stores test-faults test-engines test-processors soak check fuzz bench bench-models clean

demo: $(VENV)/.demo-ready
	$(BIN)/kvtc demo --output demo_output --force

test: check
	$(BIN)/python -m pytest -n 2

check: $(VENV)/.test-ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# The servers that stores are tested against; moto has a venv of its own, since it needs other versions than the checks.
SERVERS := $(VENV)/servers
SOAK_SECONDS ?= 300

test-stores: $(VENV)/.test-ready $(VENV)/.servers-ready
	KVTC_ALL_INSTALLED=1 KVTC_MOTO_SERVER=$(SERVERS)/bin/moto_server $(BIN)/python -m pytest tests/stores

test-faults: $(VENV)/.test-ready $(VENV)/.servers-ready
	KVTC_KILLS=200 KVTC_ALL_INSTALLED=1 KVTC_MOTO_SERVER=$(SERVERS)/bin/moto_server $(BIN)/python -m pytest tests/stores/test_faults*.py tests/engines/test_kills.py

soak: $(VENV)/.test-ready
	$(BIN)/python -m tests.stores.soak --seconds $(SOAK_SECONDS)

test-engines: $(ENGINES:%=test-engine-%)

test-engine-%:
	tests/engines/setup.sh $* $(VENV)-$*
	for program in $(wildcard tests/engines/$*_end_to_end.py tests/engines/$*_round_trip.py tests/engines/$*_kills.py); do \
		$(VENV)-$*/bin/python $$program || exit 1; done

fuzz: $(VENV)/.test-ready
	$(BIN)/python -m tests.fuzz --mutations 100000

# The same bytes whatever instruction set and number of threads: some minutes.
test-processors: $(VENV)/.test-ready
	$(BIN)/python -m tests.processors --suite

bench: $(VENV)/.test-ready
	$(BIN)/python -m benchmarks.speed.allocation
	$(BIN)/python -m benchmarks.calibration.basis
	$(BIN)/python -m benchmarks.speed.codec

# The models that published numbers are measured on: some minutes, 0.9 GB in ~/.cache/kvtc/models (KVTC_MODELS names another place).
bench-models: $(VENV)/.torch-ready
	$(INSTALL) --editable '.[bench-models]'
	$(BIN)/python -m benchmarks.models.install

# PyTorch goes first: what depends on it then takes the pinned build as it is.
$(VENV)/.torch-ready: constraints.txt
	python3 -m venv $(VENV)
	$(INSTALL) torch==2.13.0
	touch $@

$(VENV)/.demo-ready: $(VENV)/.torch-ready pyproject.toml
	$(INSTALL) --editable '.[hf]'
	touch $@

$(VENV)/.test-ready: $(VENV)/.torch-ready pyproject.toml
	$(INSTALL) --editable '.[dev]'
	touch $(VENV)/.demo-ready $@

$(VENV)/.servers-ready: $(VENV)/.torch-ready
	command -v redis-server >/dev/null || (test "$$(id -u)" = 0 && apt-get update -qq && apt-get install -y -qq redis-server openssl) || \
		(echo "redis-server is not installed, and installing it takes root" >&2; exit 1)
	python3 -m venv $(SERVERS)
	$(SERVERS)/bin/python -m pip install --quiet --disable-pip-version-check 'moto[s3]==5.2.5' flask flask-cors
	touch $@

clean:
	rm -rf $(VENV) $(ENGINES:%=$(VENV)-%) demo_output .pytest_cache .mypy_cache .ruff_cache .hypothesis
