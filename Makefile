# `make demo` installs the runtime and asks real pictures with known answers. `make test` installs what the tests need, builds the documentation and
# runs them. `make docs` builds the documentation alone, into build/docs.

PYTHON ?= python3
DEMO_VENV ?= .venv
TEST_VENV ?= .venv-test
SOURCES := pyproject.toml $(shell find pmclip_deploy train export kernels benchmarks -name '*.py' -o -name '*.cpp' -o -name '*.h' -o -name manifest.json -o -name films.json)

demo: $(DEMO_VENV)/ready
	@$(DEMO_VENV)/bin/pmclip-deploy demo
	@echo "(pmclip-deploy is $(DEMO_VENV)/bin/pmclip-deploy)"

test: $(TEST_VENV)/ready
	$(TEST_VENV)/bin/ruff check .
	$(TEST_VENV)/bin/mypy
	$(MAKE) docs
	$(TEST_VENV)/bin/python -m pytest -n 2

# Warnings are errors; the examples are run; nothing is fetched (docs/_ext/checks.py).
docs: $(TEST_VENV)/ready
	rm -rf build/docs
	$(TEST_VENV)/bin/python -m sphinx --fail-on-warning --keep-going --nitpicky --fresh-env --quiet --builder html docs build/docs
	$(TEST_VENV)/bin/python -m sphinx --fail-on-warning --keep-going --quiet --builder doctest docs build/doctest

$(DEMO_VENV)/ready: $(SOURCES)
	@echo "installing the runtime into $(DEMO_VENV), once: about a minute"
	$(PYTHON) -m venv $(DEMO_VENV) || { echo "error: python3 has no venv module; apt-get install python3-venv" >&2; exit 2; }
	$(DEMO_VENV)/bin/python -m pip install --disable-pip-version-check .
	@touch $@

$(TEST_VENV)/ready: pyproject.toml tests/constraints.txt
	$(PYTHON) -m venv $(TEST_VENV) || { echo "error: python3 has no venv module; apt-get install python3-venv" >&2; exit 2; }
	$(TEST_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --constraint tests/constraints.txt --editable '.[dev]'
	@touch $@

clean:
	rm -rf $(DEMO_VENV) $(TEST_VENV) pmclip-demo build dist *.egg-info

.PHONY: demo test docs clean
