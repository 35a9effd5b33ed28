# PYTHON=/path/to/python uses an existing environment: nothing is downloaded, nothing is installed.
ifdef PYTHON
python := $(PYTHON)
environment := check
else
python := .venv/bin/python
environment := .venv/.installed
endif

workers ?= 2
usual = -m "not matrix and not soak and not gpu"
export PYTHONPATH := $(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH))

.DEFAULT_GOAL := help
.PHONY: help install check demo test test-matrix test-soak reproduce-effect lint clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))
	@echo "  PYTHON=/path/to/python   use an existing environment instead of .venv (no network)"

install: $(environment) ## create .venv and install everything, DeepSpeed's C++ op included

.venv/.installed: setup.py scripts/install.sh
	scripts/install.sh .venv

check: ## say what an environment lacks (with PYTHON=...)
	$(python) scripts/check_environment.py

demo: $(environment) ## text in, distributed training with a kill and a resume, Hugging Face model out
	$(python) scripts/demo.py

test: $(environment) ## the tests (minutes)
	$(python) -m pytest -n $(workers) $(usual) tests/unit
	$(python) -m pytest $(usual) tests/parallel tests/resume
	$(python) -m pytest $(usual) tests/faults tests/slurm

test-matrix: $(environment) ## a cover of all supported parallel layouts against one process (eight processes at most)
	$(python) -m pytest -m matrix

test-soak: $(environment) ## long runs with faults, and every fault
	SWAX_TEST_TASK_SECONDS=1800 $(python) -m pytest -m soak --ignore tests/faults --ignore tests/slurm
	SWAX_TEST_TASK_SECONDS=1800 $(python) -m pytest tests/faults tests/slurm

reproduce-effect: $(environment) ## the experiment on attention windows: arms and seeds not done yet (minutes each), then its report (options="--parallel 6")
	$(python) scripts/reproduce_effect.py $(options)

lint: $(environment) ## ruff
	$(python) -m ruff check .

clean: ## remove caches and build products; .venv, data and runs stay
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -not -path './.venv/*' -prune -exec rm -rf {} +
