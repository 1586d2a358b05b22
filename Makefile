# `make demo` needs only Python 3.11+; `make test` creates an environment with everything.
PYTHON ?= python3
DEMO := .venv-demo
VENV := .venv
DOCS := .venv-docs
# Workers often wait for a server that they started, so there are more workers than cores.
WORKERS ?= 4
XDIST := --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder
# `make test-fast` skips these and the tests that need torch: servers, browsers, trainings, programs.
SLOW := tests/service tests/demo tests/benchmarks tests/gpu tests/docs

# Python may keep its bytecode: test workers and the servers they start import the same modules.
unexport PYTHONDONTWRITEBYTECODE

# `make types` checks types as on each of these, whatever the machine.
PLATFORMS := linux darwin win32

.PHONY: demo test test-slow test-fast test-lowest test-py313 pytest lint types $(PLATFORMS:%=types-%) links docs notebook clean

demo: $(DEMO)/installed
	$(DEMO)/bin/python demo/run.py

$(DEMO)/installed: pyproject.toml $(shell find sparsectrl_lcm runtime batch cli engine export benchmarks/harness -name '*.py' -o -name '*.json' -o -name '*.onnx')
	@echo "installing the package into $(DEMO), a minute or more"
	@test -x $(DEMO)/bin/pip || $(PYTHON) -m venv --clear $(DEMO)
	@$(DEMO)/bin/python -m pip install --quiet --disable-pip-version-check .
	@touch $@

# CI also checks the types of the other platforms. Types are checked beside the tests, which often wait.
test: lint links
	$(MAKE) --no-print-directory --jobs 2 pytest types-linux

pytest: $(VENV)/installed
	$(VENV)/bin/python -m pytest $(XDIST)

# All tests, also those that take minutes: whole trainings, builds and kills.
test-slow: $(VENV)/installed
	$(VENV)/bin/python -m pytest $(XDIST) --slow

# Lint and the quick tests, for the inner loop: a minute and a half.
test-fast: lint
	$(VENV)/bin/python -m pytest $(XDIST) --numprocesses 2 --fast $(addprefix --ignore=,$(SLOW))

# The runtime, engine and command-line tests with the lowest versions that pyproject.toml allows.
test-lowest: .venv-lowest/installed
	.venv-lowest/bin/python -m pytest $(XDIST) tests/runtime tests/engine tests/export tests/cli

.venv-lowest/installed: pyproject.toml
	test -x .venv-lowest/bin/pip || $(PYTHON) -m venv --clear .venv-lowest
	.venv-lowest/bin/python -m pip install --quiet --disable-pip-version-check uv
	.venv-lowest/bin/uv pip install --python .venv-lowest --resolution lowest-direct --editable '.[dev]'
	touch $@

# The tests on another Python, with the versions of constraints.txt.
test-py313:
	$(MAKE) pytest PYTHON=python3.13 VENV=.venv-py313

lint: $(VENV)/installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

types: $(VENV)/installed links
	$(MAKE) --no-print-directory --jobs 2 $(PLATFORMS:%=types-%)

types-win32: WITHOUT := --exclude /service/ --follow-imports silent
$(PLATFORMS:%=types-%): types-%:
	cd .types && ../$(VENV)/bin/mypy --config-file ../pyproject.toml --platform $* \
	  --cache-dir ../.mypy_cache/$* $(WITHOUT) -p sparsectrl_lcm

# The folders lie at the top of the repository; through these links mypy finds them under their package name.
links:
	rm -rf .types
	mkdir -p .types/sparsectrl_lcm/benchmarks
	ln -s $(addprefix ../../,$(wildcard sparsectrl_lcm/*.py)) .types/sparsectrl_lcm
	ln -s ../../../benchmarks/harness .types/sparsectrl_lcm/benchmarks
	for part in batch cli engine export runtime service; do ln -s ../../$$part .types/sparsectrl_lcm; done

$(VENV)/installed: pyproject.toml constraints.txt
	test -x $(VENV)/bin/pip || $(PYTHON) -m venv --clear $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

docs: $(DOCS)/installed links
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build --strict --quiet

# Runs docs/notebook.ipynb and writes its outputs into it.
notebook: $(DOCS)/installed links
	PYTHONPATH=$(CURDIR)/.types $(DOCS)/bin/jupyter execute --inplace docs/notebook.ipynb

$(DOCS)/installed: pyproject.toml constraints.txt
	test -x $(DOCS)/bin/pip || $(PYTHON) -m venv --clear $(DOCS)
	$(DOCS)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt '.[docs]'
	touch $@

clean:
	rm -rf $(DEMO) $(VENV) $(DOCS) .venv-lowest .venv-py313 .types .cache build out *.egg-info .mypy_cache .ruff_cache .pytest_cache
