# `make demo` installs the runtime and asks questions about three pictures whose answers are known. `make test` installs what the tests need, runs ruff
# and mypy, builds the documentation and runs the tests. `make docs` builds the documentation, into build/docs, and runs its examples.

PYTHON ?= python3
DEMO_VENV ?= .venv
TEST_VENV ?= .venv-test
SOURCES := pyproject.toml $(shell find pmclip_deploy train export kernels benchmarks -name '*.py' -o -name '*.cpp' -o -name '*.h' -o -name manifest.json -o -name films.json)

demo: $(DEMO_VENV)/ready
	@$(DEMO_VENV)/bin/pmclip-deploy demo
	@echo "(pmclip-deploy is $(DEMO_VENV)/bin/pmclip-deploy)"

test: $(TEST_VENV)/ready
	$(TEST_VENV)/bin/ruff check .
	$(MAKE) --jobs 2 --output-sync types docs
	$(TEST_VENV)/bin/python -m pytest -n 2

types: $(TEST_VENV)/ready
	$(TEST_VENV)/bin/mypy

# A warning fails the build, and so does a page that fetches something from another host (docs/_ext/checks.py). The second line runs the examples.
docs: $(TEST_VENV)/ready
	rm -rf build/docs
	$(TEST_VENV)/bin/python -m sphinx --fail-on-warning --keep-going --nitpicky --fresh-env --quiet --builder html docs build/docs
	$(TEST_VENV)/bin/python -m sphinx --fail-on-warning --keep-going --fresh-env --quiet --builder doctest docs build/doctest

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

.PHONY: demo test types docs clean
