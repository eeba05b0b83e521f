# Two commands do everything: `make demo` and `make test`. Both set up .venv with pinned versions.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
OUTPUT ?= runs/demo
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt

.PHONY: help demo test unit lint docs bench gpu controls clean

help:
	@echo "make demo      run the gold-world demo and say where its page is (OUTPUT=$(OUTPUT))"
	@echo "make test      lint, type check and all tests"
	@echo "make unit      the fast tests only"
	@echo "make docs      build the manual into build/docs; warnings are errors"
	@echo "make bench     reward-model steps against TRL's, a quarter of an hour on two idle cores"
	@echo "make gpu       tests, speed and a real model on one H100 or H200 (see benchmarks/gpu_suite.py)"
	@echo "make controls  the gold world's controls, about half an hour"

# torch first and by its exact version: an unpinned torch would pull gigabytes of CUDA.
$(VENV)/.installed: pyproject.toml constraints.txt
	@echo "Setting up $(VENV) (the first time takes a minute or two)"
	$(PYTHON) -m venv $(VENV)
	$(PIP) pip setuptools wheel
	$(PIP) $$(grep '^torch==' constraints.txt)
	$(PIP) --no-build-isolation --editable '.[dev,docs,gguf,judge,peft,qlora,serve]'
	@touch $@

demo: $(VENV)/.installed
	$(BIN)/shiftrm demo --output $(OUTPUT)

test: lint
	$(BIN)/python -m pytest -n 2 --durations 10

unit: $(VENV)/.installed
	$(BIN)/python -m pytest -n 2 -m "not slow"

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/.installed
	$(BIN)/sphinx-build -W --keep-going -b html docs build/docs

bench: $(VENV)/.installed
	$(BIN)/python benchmarks/reward_step.py

# With the machine's own Python, whose torch has CUDA.
gpu:
	$(PYTHON) benchmarks/gpu_suite.py run $(if $(MODEL),--model $(MODEL)) $(if $(PAIRS),--pairs $(PAIRS))

controls: $(VENV)/.installed
	$(BIN)/python benchmarks/gold_world_controls.py --seeds 0 1 2 --output runs/controls

clean:
	rm -rf $(VENV) build dist src/*.egg-info
