# `make help` lists the targets. On a machine without a GPU, `make demo` is the whole project in one command.

.DEFAULT_GOAL := help
PYTHON ?= $(shell requirements/find_python.sh)
venv_python := .venv/bin/python
sources := batch_invariant_ops vllm tests benchmarks examples requirements
# What the user named, before docker.mk fills in its own default.
serve_model := $(or $(VLLM_MODEL),$(MODEL_NAME))

.PHONY: help install install-dev demo serve test check format clean

help: ## List the targets
	@sed -nE 's/^([a-z-]+):[^#]*## (.*)/\1\t\2/p' $(MAKEFILE_LIST) | awk -F '\t' '{printf "  %-24s %s\n", $$1, $$2}'

# Each is a few milliseconds when nothing has changed.
install:
	@python="$(PYTHON)"; test -n "$$python" && exec $$python requirements/install.py cpu demo

install-dev:
	@python="$(PYTHON)"; test -n "$$python" && exec $$python requirements/install.py cpu demo dev

demo: install ## Prove it without a GPU: plain vLLM and the batch-invariant server side by side, and report.html
	@exec $(venv_python) vllm/demo.py

serve: install ## Run the server in the foreground on the CPU (VLLM_MODEL, VLLM_PORT, BATCH_INVARIANT)
	@MODEL_NAME='$(serve_model)' exec $(venv_python) vllm/demo.py --serve

test: install-dev ## Run every test that needs no GPU, a real CPU server's control and proof among them
	@exec $(venv_python) -m pytest -n 2

check: install-dev ## Lint, format and types
	$(venv_python) -m ruff check $(wildcard $(sources))
	$(venv_python) -m ruff format --check $(wildcard $(sources))
	$(venv_python) -m mypy

format: install-dev ## Format the sources and mend what the linter can
	$(venv_python) -m ruff format $(wildcard $(sources))
	$(venv_python) -m ruff check --fix $(wildcard $(sources))

clean: ## Remove what was installed and made: .venv, the demo's files, caches
	rm -rf .venv .demo report.html build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

-include docker.mk
