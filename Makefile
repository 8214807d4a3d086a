# `make serve` and `make test` need Python 3.11 or newer and nothing else; everything is installed into .venv/ here.
#
#   PYTHON  the Python to make .venv/ with:                  make test PYTHON=python3.12
#   TORCH   what pip is asked for, its options included:     make serve TORCH="torch==2.13.0 --index-url URL"
#   ARGS    passed to `gossamer serve`, or to pytest:        make serve ARGS="--port 9000"

PYTHON ?= python3
TORCH ?= torch==2.13.0
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip -qq --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help serve test lint types format docs wheel docker clean FORCE

help: ## show this list
	@grep -E '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## (.*)/  make \1\t\2/' | expand -t 16

serve: $(VENV)/installed ## serve gossamer-demo on 127.0.0.1:8000
	@$(BIN)/gossamer serve $(ARGS)

test: $(VENV)/installed-dev ## run the tests, in two processes
	@$(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

lint: $(VENV)/installed-dev ## check style and formatting
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

types: $(VENV)/installed-dev ## check the types
	@$(BIN)/mypy --strict -p gossamer

format: $(VENV)/installed-dev ## format the code and sort the imports
	@$(BIN)/ruff check --fix --quiet .
	@$(BIN)/ruff format .

docs: $(VENV)/installed ## write docs/configuration.md and docs/policy.schema.json from the code
	@$(BIN)/python docs/write_configuration.py
	@$(BIN)/python docs/write_policy_schema.py

wheel: $(VENV)/installed ## build a wheel into dist/
	@rm -rf build
	@$(PIP) wheel --no-deps --wheel-dir dist .
	@ls dist/*.whl

docker: ## build the CPU image, gossamer:cpu
	docker build --target cpu --tag gossamer:cpu .

clean: ## remove .venv/ and everything that was built
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Files in .venv/ say what is installed, so that the second run starts at once. torch comes first and by itself: what is
# asked for afterwards accepts it, and nothing pulls in another build of it.
$(VENV)/torch: FORCE
	@if [ "$$(cat $@ 2>/dev/null)" = '$(TORCH)' ]; then exit; fi; \
	if ! $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	    echo 'Gossamer needs Python 3.11 or newer, which "$(PYTHON)" is not: name one that is, as in `make serve PYTHON=python3.12`.' >&2; exit 1; \
	fi; \
	if ! $(PYTHON) -c 'import ensurepip, venv' 2>/dev/null; then \
	    echo '"$(PYTHON)" cannot make virtual environments: install its venv module (on Debian and Ubuntu the package python3-venv).' >&2; exit 1; \
	fi; \
	echo 'Setting up .venv/ with $(TORCH) and what Gossamer needs; this takes some minutes, once.'; \
	{ [ -x $(BIN)/python ] || $(PYTHON) -m venv $(VENV); } && \
	$(PIP) install $(TORCH) && \
	printf '%s' '$(TORCH)' >$@

$(VENV)/installed: $(VENV)/torch pyproject.toml
	@$(PIP) install --editable .
	@touch $@

$(VENV)/installed-dev: $(VENV)/torch pyproject.toml
	@echo 'Installing what the tests and checks need.'
	@$(PIP) install --editable '.[dev]'
	@touch $@ $(VENV)/installed

FORCE:
