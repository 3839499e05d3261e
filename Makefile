# Each target works on a machine that only has Python, and repeats no finished work.
PYTHON ?= python3
BIN := .venv/bin
TESTS = OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 WANDB_MODE=offline NO_ALBUMENTATIONS_UPDATE=1 $(BIN)/python -m pytest

.PHONY: help train test test-slow test-gpu test-lowest lint docs audit clean

help:
	@echo "make train        install, train on the embedded data, print the result table"
	@echo "make test         install, run the tests (test-slow: long ones; test-gpu: those for a GPU)"
	@echo "make test-lowest  run the tests with every dependency at its lowest version"
	@echo "make audit        list known vulnerabilities of the installed packages (needs a network)"
	@echo "make lint         run ruff, ruff-format and mypy, like the pre-commit hooks"
	@echo "make docs         check the generated pages, build the documentation into site/"
	@echo "make clean        remove environments and caches, but neither data/ nor outputs/"

train: .venv/ready
	$(BIN)/python -m crislit.train

test: .venv/ready-dev
	$(TESTS) -n auto -m "not slow and not gpu"

test-slow: .venv/ready-dev
	$(TESTS) -n 2 --dist worksteal -m "slow and not gpu"

test-gpu: .venv/ready-dev
	$(TESTS) -m gpu

# A separate environment, without warnings as errors: old releases warn about each other.
test-lowest: .venv-lowest/ready
	$(subst $(BIN),.venv-lowest/bin,$(TESTS)) -W default -n auto -m "not slow and not gpu"

lint: .venv/ready-dev
	$(BIN)/pre-commit run --all-files

docs: .venv/ready-dev
	$(BIN)/python -m scripts.pages --check
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	@echo "to read it: python3 -m http.server --directory site"

# pip-audit has its own environment, so that it does not audit itself.
audit: .venv/ready-dev
	test -x .venv-audit/bin/pip-audit || { $(PYTHON) -m venv .venv-audit && .venv-audit/bin/pip install --quiet "pip-audit>=2.7"; }
	PIPAPI_PYTHON_LOCATION=$(BIN)/python .venv-audit/bin/pip-audit --skip-editable --progress-spinner off --timeout 60 \
	  > .venv-audit/report 2>&1; code=$$?; cat .venv-audit/report; \
	  test $$code = 0 || { echo "error: there are vulnerabilities, or pip-audit could not look them up: see above" >&2; exit 1; }
	@! grep -q "could not be audited" .venv-audit/report \
	  || { echo "error: some packages could not be audited: see above" >&2; exit 1; }

.venv/bin/python:
	@$(PYTHON) scripts/check_machine.py
	$(PYTHON) -m venv .venv

.venv/ready: pyproject.toml .venv/bin/python
	@echo "installing into .venv: several gigabytes, this takes minutes (docs/get_started.md: less without a GPU)"
	$(BIN)/python -m pip install --quiet --no-compile --editable .
	@touch $@

.venv/ready-dev: pyproject.toml .venv/bin/python
	@echo "installing into .venv: several gigabytes, this takes minutes"
	$(BIN)/python -m pip install --quiet --no-compile --editable ".[dev]"
	@touch $@ .venv/ready

.venv-lowest/ready: pyproject.toml
	@$(PYTHON) scripts/check_machine.py
	$(PYTHON) -m venv .venv-lowest
	@echo "installing into .venv-lowest: several gigabytes, this takes minutes"
	.venv-lowest/bin/python -m pip install --quiet "uv>=0.5"
	.venv-lowest/bin/uv pip install --quiet --python .venv-lowest/bin/python --resolution lowest-direct --compile-bytecode --editable ".[dev]"
	@touch $@

clean:
	rm -rf .venv .venv-lowest .venv-audit build dist site .pytest_cache .mypy_cache .ruff_cache .hypothesis
