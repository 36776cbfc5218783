# Every command of this project.  `make` alone lists them.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory
# A dry run starts some twenty Python processes: without cached bytecode each compiles its libraries anew (5 s each).
unexport PYTHONDONTWRITEBYTECODE

VENV := .venv
PYTHON := $(VENV)/bin/python
STAMP := $(VENV)/.setup-complete
EXTRAS := data train eval pipeline dev
RECIPE ?= workflows/recipes/tiny.yaml
RECIPES = $(wildcard workflows/recipes/*.yaml)
TESTS ?= tests
# Tests that need the model alone, what they need besides torch, and the torch versions that test-torch runs them on.
MODEL_TESTS := $(addprefix tests/,unit/test_model_goldens.py unit/test_generate.py property/test_attention_backends.py \
    property/test_packs_equal_examples.py property/test_sampling.py property/test_cache_attention.py \
    property/test_weighted_loss.py property/test_dropout.py)
MODEL_NEEDS := numpy|tokenizers|scipy|hypothesis|pytest|pytest-timeout
TORCH ?= 2.6.0 2.11.0 2.15.0

.PHONY: help setup dry-run test test-torch check bench compile clean lock

help: ## list the commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo
	@echo "  RECIPE=FILE chooses what dry-run trains, TESTS=PATH what test runs."

setup: $(STAMP) ## install everything into .venv from requirements.lock (Python 3.11 or 3.12, Linux x86-64); no-op when done

$(STAMP): requirements.lock pyproject.toml
	@rm -f $(STAMP)
	@usable='import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))'; \
	if ! { $(PYTHON) -c "$$usable" && { $(PYTHON) -m uv --version || $(PYTHON) -m pip --version; }; } >/dev/null 2>&1; then \
	    found=; \
	    for candidate in python3.11 python3.12 python3 python; do \
	        if $$candidate -c "import ensurepip, venv; $$usable" >/dev/null 2>&1; then found=$$candidate; break; fi; \
	    done; \
	    if [ -z "$$found" ]; then \
	        echo "setup: no Python 3.11 or 3.12 with venv and ensurepip on PATH; install one (Debian: python3.11-venv)" >&2; exit 2; \
	    fi; \
	    echo "setup: $(VENV) from $$($$found --version)"; \
	    $$found -m venv --clear $(VENV); \
	fi
	@$(PYTHON) -m uv --version >/dev/null 2>&1 || $(PYTHON) -m pip install --quiet "$$(grep '^uv==' requirements.lock)"
	@echo "setup: $$(grep -c == requirements.lock) packages of requirements.lock (about 6 GB with a cold cache)"
	@$(PYTHON) -m uv pip install --python $(PYTHON) --no-deps --requirements requirements.lock
	@$(PYTHON) -m uv pip install --python $(PYTHON) --no-deps --no-build-isolation --offline --quiet --editable .
	@touch $(STAMP)
	@echo "setup: done"

dry-run: setup ## train, evaluate and register a tiny Molmo2 here, in a local pipeline
	@$(PYTHON) -m workflows.run local --recipe $(RECIPE)

test: setup ## all tests
	@$(PYTHON) -m pytest $(TESTS)

test-torch: setup ## the model's tests on the torch versions of TORCH="2.6.0 ...", each in an environment that is thrown away
	@for version in $(TORCH); do \
	    folder=$$(mktemp -d); trap 'rm -rf "$$folder"' EXIT; \
	    $(PYTHON) -m uv venv --quiet --python $(PYTHON) "$$folder/venv"; \
	    grep -E '^($(MODEL_NEEDS))==' requirements.lock >"$$folder/needs.txt"; \
	    $(PYTHON) -m uv pip install --quiet --python "$$folder/venv/bin/python" "torch==$$version" -r "$$folder/needs.txt"; \
	    echo "test-torch: torch $$version"; \
	    "$$folder/venv/bin/python" -m pytest --quiet -p no:cacheprovider $(MODEL_TESTS); \
	    rm -rf "$$folder"; \
	done

check: setup ## lint, format, types, import contract, containerfiles, Kubernetes manifests, tracked files
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports
	$(VENV)/bin/hadolint images/*/Containerfile
	$(VENV)/bin/yamllint --strict .
	$(PYTHON) -m infra.check
	$(PYTHON) -m pytest --quiet tests/architecture/test_tracked_files.py

bench: setup ## every side-by-side measurement of benchmarks/; each prints its ratio last
	@for file in benchmarks/*.py; do echo "== $$file"; $(PYTHON) "$$file"; done

compile: setup ## compile every recipe's pipeline into build/
	@mkdir -p build
	@for recipe in $(RECIPES); do \
	    $(PYTHON) -m workflows.run compile --recipe "$$recipe" --output "build/$$(basename "$$recipe")"; \
	done

lock: setup ## resolve requirements.lock anew (keeps what is pinned where it can); the same set for 3.11 and 3.12
	@for version in 3.11 3.12; do \
	    $(PYTHON) -m uv pip compile pyproject.toml $(addprefix --extra ,$(EXTRAS)) --overrides requirements.overrides \
	        --python-version $$version --python-platform x86_64-manylinux_2_28 --no-annotate --no-emit-index-url \
	        --custom-compile-command "make lock" --quiet --output-file requirements.lock; \
	    cp requirements.lock $(VENV)/lock-$$version.txt; \
	done
	@diff $(VENV)/lock-3.11.txt $(VENV)/lock-3.12.txt && echo "lock: $$(grep -c == requirements.lock) packages, the same for 3.11 and 3.12"

clean: ## remove what the commands above made, except .venv and runs/
	@rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis .coverage
	@find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
