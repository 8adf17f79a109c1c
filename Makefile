# make quickstart: from a fresh clone to a report. make test: the suite. make check: lint, format, types.
# To use an environment of your own: pip install -e . -c constraints.txt, then python -m align.run recipe=dpo
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
export HF_HUB_DISABLE_TELEMETRY = 1

.PHONY: quickstart test check slow clean

quickstart: $(VENV)/.installed
	$(BIN)/python -m align.run recipe=dpo

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest

slow: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m slow

check: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# torch comes first and pinned: a plain "torch" would pull gigabytes of CUDA where a CPU build is to be had.
$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install -q -e . -c constraints.txt
	touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install -q -e ".[dev]" -c constraints.txt
	touch $@ $(VENV)/.installed

clean:
	rm -rf $(VENV) runs outputs multirun dist .mypy_cache .ruff_cache .pytest_cache
