# The commands a person types. Each first sees to .venv, which costs nothing once it is ready.
#
#   make run ARGS="rl.algorithm.kl_coef=0.05"     more words for the command behind a target
#   make PYTHON=python3.12 run                    another interpreter
#   make UV=false run                             install with pip alone

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV   := .venv
BIN    := $(VENV)/bin
UV     ?= $(BIN)/uv
READY  := $(VENV)/.ready
HALF   := $(VENV)/.unfinished

.DEFAULT_GOAL := help
.PHONY: help setup run test lint mutation kill bench compile serve clean

help: ## list these commands
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-9s %s\n", $$1, $$2}' Makefile

setup: $(READY) ## make .venv and nothing else

run: $(READY) ## the demo, from made-up feedback to a served model (seven to eight minutes on 2 cores)
	@$(BIN)/plumbline run -c pipeline/configs/demo.yaml $(ARGS)

test: lint ## lint, then every test
	@$(BIN)/python -m pytest -q $(ARGS)

lint: $(READY) ## ruff and mypy
	@$(BIN)/ruff check --quiet
	@$(BIN)/mypy --no-error-summary

mutation: $(READY) ## how many small mistakes in the algorithms the tests notice (some minutes)
	@$(BIN)/python benchmarks/mutation.py $(ARGS)

compile: $(READY) ## write pipeline.yaml, which Kubeflow runs
	@$(BIN)/plumbline compile $(ARGS)

serve: $(READY) ## answer on an OpenAI-compatible port with the model deployed last
	@$(BIN)/plumbline serve $(ARGS)

kill: $(READY) ## kill 50 tiny rl runs at random moments and start them again (some minutes)
	@$(BIN)/python benchmarks/kill_resume.py $(ARGS)

bench: $(READY) ## ours against TRL: seconds a step and peak memory (some hours on 2 cores; --quick: minutes)
	@$(BIN)/python benchmarks/bench.py $(ARGS)

clean: ## remove caches; .venv and runs stay
	@rm -rf .mypy_cache .pytest_cache .ruff_cache build dist
	@find . -path ./$(VENV) -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamp holds the folder it was made in: scripts in a .venv that was moved or copied point to the old one.
ifneq ($(shell cat $(READY) 2>/dev/null),$(CURDIR))
.PHONY: $(READY)
endif

# A .venv of ours that was interrupted or moved is made again; one that somebody made by hand is only added to.
# uv does not read pip's configuration, so it is handed where pip looks and whom pip trusts; where it is missing or
# fails, pip does the same in minutes. compileall ignores files that are templates and no Python.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))' || { \
		echo "plumbline needs Python 3.11 or 3.12; '$(PYTHON)' is not one. Name one: make PYTHON=/path/to/python3.11"; \
		exit 1; }
	@if [ -e $(HALF) ] || { [ -e $(READY) ] && [ "$$(cat $(READY))" != "$(CURDIR)" ]; }; then rm -rf $(VENV); fi
	@if [ ! -d $(VENV) ] || [ -e $(READY) ]; then mkdir -p $(VENV) && touch $(HALF); fi
	@echo "Setting up $(VENV): under a minute with uv, some minutes with pip."
	@$(BIN)/python -c '' 2>/dev/null || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --constraint constraints.txt uv || true
	@pip_options=$$($(BIN)/python -m pip config list); \
	option() { printf '%s\n' "$$pip_options" | sed -nE "s/^(:env:|global|install)\.$$1='(.*)'$$/\2/p" \
		| head -n 1 | sed 's/\\n/ /g'; }; \
	export UV_FIND_LINKS="$${UV_FIND_LINKS:-$$(option find-links | tr -s ' ' ',')}"; \
	export UV_EXTRA_INDEX_URL="$${UV_EXTRA_INDEX_URL:-$$(option extra-index-url)}"; \
	export UV_DEFAULT_INDEX="$${UV_DEFAULT_INDEX:-$$(option index-url)}"; \
	cert="$${SSL_CERT_FILE:-$$(option cert)}"; \
	env $${cert:+SSL_CERT_FILE="$$cert"} $(UV) pip install --quiet --python $(BIN)/python \
		--index-strategy unsafe-best-match --constraint constraints.txt --build-constraint constraints.txt \
		--editable '.[dev]' || { \
		echo "uv could not install; pip does it now, in some minutes."; \
		PIP_CONSTRAINT=constraints.txt $(BIN)/python -m pip install -qq --disable-pip-version-check \
			--editable '.[dev]'; }
	@PYTHONDONTWRITEBYTECODE= $(BIN)/python -m compileall -qq -j 0 $(VENV)/lib || true
	@printf '%s' '$(CURDIR)' > $(READY) && rm -f $(HALF)
