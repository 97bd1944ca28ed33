# Everything happens in .venv, which the first target makes. Python: `make PYTHON=python3.12`.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DOCS_STAMP := $(VENV)/.docs
PYTEST := $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder

# The interpreter asked for comes first, then whatever supported one the machine has.
CANDIDATES := $(PYTHON) python3.11 python3.12 python3.13
SUPPORTED := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))

# A process gets one thread: stages run side by side, one process each.
export OMP_NUM_THREADS := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help demo docs test test-slow lint wheel clean check-python

help: ## say what the targets do
	@sed -n 's/^\([a-z-]*\):[^#]*## /\1	/p' Makefile | expand -t 8

demo: $(STAMP) ## compile ResNet-1001 into four stages, in build/resnet1001
	@mkdir -p build
	$(BIN)/pnn-compile examples/resnet1001.py -n 4 -o build/resnet1001

test: $(STAMP) ## run the tests but the slow ones, a process a core
	$(PYTEST)

test-slow: $(STAMP) ## run the slow tests alone: long sweeps and large models
	$(PYTEST) -m slow

lint: $(STAMP) ## check style, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(DOCS_STAMP) ## build the documentation in build/site, and check its links
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict -f .ci/mkdocs.yml

# What is installed shadows the checkout: the commands run outside of it, as a user would.
wheel: $(STAMP) ## build a wheel, install it into build/wheel, and use it outside of the checkout
	rm -rf build/wheel && mkdir -p build/wheel
	$(BIN)/python -m pip wheel --quiet --no-deps -w build/wheel .
	$(BIN)/python -m pip install --quiet --no-deps --target build/wheel/site build/wheel/*.whl
	cp examples/vgg16.py build/wheel
	cd build/wheel && export PYTHONPATH=$(CURDIR)/build/wheel/site \
		&& python=$(CURDIR)/$(BIN)/python \
		&& $$python -c 'import passes; assert "/build/wheel/site/" in passes.__file__' \
		&& $$python -m pnn_compile vgg16.py -n 2 -q -o network \
		&& $$python -m pnn_compile verify network \
		&& $$python -m pnn_compile forecast network -n 2 --devices h100

clean: ## remove what was built, and caches; .venv stays
	rm -rf build dist .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find passes pnn_compile tests examples -type d -name __pycache__ -prune -exec rm -rf {} +

# Sets $python to the first candidate that is supported and can make a virtual environment.
define find_python
python=; unequipped=; \
for candidate in $(CANDIDATES); do \
	if "$$candidate" -c '$(SUPPORTED)' >/dev/null 2>&1; then \
		if "$$candidate" -c 'import ensurepip, venv' >/dev/null 2>&1; then \
			python=$$candidate; break; \
		fi; \
		unequipped=$${unequipped:-$$candidate}; \
	fi; \
done; \
if [ -z "$$python" ] && [ -n "$$unequipped" ]; then \
	echo "error: $$unequipped cannot create virtual environments;" \
		"on Debian and Ubuntu: apt-get install python3-venv" >&2; \
	exit 2; \
elif [ -z "$$python" ]; then \
	echo "error: no Python 3.11, 3.12 or 3.13 found (tried: $(CANDIDATES));" \
		"install one, or name it: make PYTHON=/path/to/python3.11" >&2; \
	exit 2; \
fi
endef

check-python:
	@$(find_python); echo "$$python"

# torch goes first, pinned: asked for by another package it could come in another version or build.
$(STAMP): pyproject.toml constraints.txt
	@if ! { $(BIN)/python -c '$(SUPPORTED)' && $(BIN)/python -m pip --version; } >/dev/null 2>&1; then \
		$(find_python); \
		echo "making $(VENV) with $$python"; \
		"$$python" -m venv --clear $(VENV); \
	fi
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	@touch $@

$(DOCS_STAMP): $(STAMP)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[docs]'
	@touch $@
