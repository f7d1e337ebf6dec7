# make demo   install, start a fleet, stream one answer, show what happened, stop
# make up     the same fleet, kept running;  make down stops it
# make test   all tests;  make lint, make bench
# make bench-gateway   the gateway beside sglang-router and smg
# make crds   the CRDs and the chart's values schema, from the classes
# make chaos  hundreds of faults on real fleets (about an hour); make chaos FAULTS=30 SEED=7
#
# Everything is installed into .venv, once; change a requirement file and it is brought up to date.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet

.PHONY: demo up down status test unit lint format bench bench-gateway chaos crds install dev sdk-venv bench-venv
.DELETE_ON_ERROR:

demo: install
	$(BIN)/tandem demo

up: install
	$(BIN)/tandem up --detach

down: install
	$(BIN)/tandem down

status: install
	$(BIN)/tandem status

# The unit tests two at a time. Those that mostly wait two files at a time: on Kubernetes, each on a control plane in a
# network of its own, and those of a fleet with stand-ins for engines. The others share fleets, or look at times.
IN_PAIRS := tests/fleet

test: unit sdk-venv
	$(BIN)/python -m pytest tests/kube -n 2 --dist loadfile --durations=15
	$(BIN)/python -m pytest $(IN_PAIRS) -m 'not alone' -n 2 --dist loadfile --durations=15
	$(BIN)/python -m pytest $(IN_PAIRS) -m alone
	$(BIN)/python -m pytest --ignore tests/unit --ignore tests/kube $(IN_PAIRS:%=--ignore %) --durations=15

unit: dev
	$(BIN)/python -m pytest tests/unit -n 2

bench: dev
	$(BIN)/tandem bench

bench-gateway: dev bench-venv
	PYTHONPATH=tests $(BIN)/python -m bench.gateway

FAULTS ?= 300
SEED ?= 1

chaos: dev
	mkdir -p bench-results
	PYTHONPATH=tests $(BIN)/python -m chaos --faults $(FAULTS) --seed $(SEED) --json bench-results/chaos.json

crds: dev
	$(BIN)/python -m tandem_operator.crds
	$(BIN)/python -m tandem_operator.chart_values

lint: dev
	$(BIN)/ruff format --check platform operators tests
	$(BIN)/ruff check platform operators tests
	$(BIN)/mypy

format: dev
	$(BIN)/ruff format platform operators tests
	$(BIN)/ruff check --fix platform operators tests

install: $(VENV)/.installed
dev: $(VENV)/.installed-dev

$(VENV)/.created:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Tandem needs Python 3.11 or newer; set PYTHON=…")'
	$(PYTHON) -m venv $(VENV)
	touch $@

# torch's +cpu build is not on PyPI: take it where pip is set up to find it, else from PyTorch's own index.
$(VENV)/.torch: requirements/torch-cpu.txt | $(VENV)/.created
	@echo "Installing torch (CPU) …"
	$(PIP) -r $< 2>$(VENV)/torch.log || $(PIP) -r $< --extra-index-url $(TORCH_INDEX) || { cat $(VENV)/torch.log >&2; exit 1; }
	touch $@

$(VENV)/.requirements: requirements/runtime.txt requirements/engine-cpu.txt requirements/engine-cpu-nodeps.txt $(VENV)/.torch
	@echo "Installing the engine and what Tandem needs (about 2 GB, a few minutes) …"
	$(PIP) --no-deps -r requirements/engine-cpu-nodeps.txt
	$(PIP) -c requirements/torch-cpu.txt -r requirements/runtime.txt -r requirements/engine-cpu.txt
	touch $@

# The gRPC stubs are generated when the package is built, so a changed .proto builds it again.
$(VENV)/.installed: pyproject.toml $(wildcard proto/tandem/v1/*.proto) $(VENV)/.requirements
	$(PIP) --no-deps --editable .
	touch $@

$(VENV)/.installed-dev: requirements/dev.txt requirements/operator.txt $(VENV)/.installed
	$(PIP) -c requirements/torch-cpu.txt -r requirements/dev.txt -r requirements/operator.txt
	touch $@

# Other people's clients, and other people's gateways, in environments of their own.
sdk-venv: $(VENV)-sdk/.installed
bench-venv: $(VENV)-bench/.installed

$(VENV)-sdk/.installed: requirements/sdk.txt
	@echo "Installing the clients that the API is tested with …"
	$(PYTHON) -m venv $(VENV)-sdk
	$(VENV)-sdk/bin/python -m pip --disable-pip-version-check install --quiet --no-deps -r $<
	touch $@

$(VENV)-bench/.installed: requirements/bench.txt
	$(PYTHON) -m venv $(VENV)-bench
	$(VENV)-bench/bin/python -m pip --disable-pip-version-check install --quiet --no-deps -r $<
	touch $@
