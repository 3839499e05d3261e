# Each target works alone on a machine with nothing but Python, and does nothing twice.
PYTHON ?= python3
BIN := .venv/bin
TESTS = OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 WANDB_MODE=offline NO_ALBUMENTATIONS_UPDATE=1 $(BIN)/python -m pytest

.PHONY: help train test test-slow test-gpu lint clean

help:
	@echo "make train      install, train on the embedded data, print the result table"
	@echo "make test       install, run the tests (test-slow: the long ones; test-gpu: those that need a GPU)"
	@echo "make lint       ruff, ruff-format and mypy, as before every commit"
	@echo "make clean      remove .venv and caches; data/ and outputs/ stay"

train: .venv/ready
	$(BIN)/python -m crislit.train

test: .venv/ready-dev
	$(TESTS) -n auto -m "not slow and not gpu"

test-slow: .venv/ready-dev
	$(TESTS) -n 2 --dist loadfile -m "slow and not gpu"

test-gpu: .venv/ready-dev
	$(TESTS) -m gpu

lint: .venv/ready-dev
	$(BIN)/pre-commit run --all-files

.venv/bin/python:
	@$(PYTHON) scripts/check_machine.py
	$(PYTHON) -m venv .venv

.venv/ready: pyproject.toml .venv/bin/python
	@echo "installing into .venv: PyTorch alone is some gigabytes, this takes minutes"
	$(BIN)/python -m pip install --quiet --editable .
	@touch $@

.venv/ready-dev: pyproject.toml .venv/bin/python
	@echo "installing into .venv: PyTorch alone is some gigabytes, this takes minutes"
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	@touch $@ .venv/ready

clean:
	rm -rf .venv build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
