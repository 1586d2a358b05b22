# `make demo` needs Python 3.11+ alone; `make test` makes an environment with everything.
PYTHON ?= python3
DEMO := .venv-demo
VENV := .venv
DOCS := .venv-docs

.PHONY: demo test lint types links docs clean

demo: $(DEMO)/installed
	$(DEMO)/bin/python demo/run.py

$(DEMO)/installed: pyproject.toml $(shell find sparsectrl_lcm runtime cli engine export benchmarks/harness -name '*.py' -o -name '*.json' -o -name '*.onnx')
	test -x $(DEMO)/bin/pip || $(PYTHON) -m venv --clear $(DEMO)
	$(DEMO)/bin/python -m pip install --quiet --disable-pip-version-check .
	touch $@

test: lint types
	$(VENV)/bin/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile

lint: $(VENV)/installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

types: $(VENV)/installed links
	cd .types && for platform in linux darwin win32; do \
	  if [ $$platform = win32 ]; then without='--exclude /service/ --follow-imports silent'; else without=; fi; \
	  ../$(VENV)/bin/mypy --config-file ../pyproject.toml --platform $$platform \
	    --cache-dir ../.mypy_cache/$$platform $$without -p sparsectrl_lcm || exit 1; \
	done

# The folders stand at the top of the repository; mypy finds them under their package name through links.
links:
	rm -rf .types
	mkdir -p .types/sparsectrl_lcm/benchmarks
	ln -s ../../sparsectrl_lcm/__init__.py ../../sparsectrl_lcm/__main__.py .types/sparsectrl_lcm
	ln -s ../../../benchmarks/harness .types/sparsectrl_lcm/benchmarks
	for part in cli engine export runtime service; do ln -s ../../$$part .types/sparsectrl_lcm; done

$(VENV)/installed: pyproject.toml constraints.txt
	test -x $(VENV)/bin/pip || $(PYTHON) -m venv --clear $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

docs: $(DOCS)/installed links
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build --strict --quiet

$(DOCS)/installed: pyproject.toml constraints.txt
	test -x $(DOCS)/bin/pip || $(PYTHON) -m venv --clear $(DOCS)
	$(DOCS)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt '.[docs]'
	touch $@

clean:
	rm -rf $(DEMO) $(VENV) $(DOCS) .types .cache build out *.egg-info .mypy_cache .ruff_cache .pytest_cache
