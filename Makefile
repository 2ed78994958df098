# Each goal sets up what it needs: `make demo` and `make test` work on a fresh machine with Python 3.11 or later.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/installed
FOLDERS := passes schedules kernels tuning benchmarks
# On few cores, threads of several libraries only get into each other's way.
export OMP_NUM_THREADS ?= 1

.PHONY: demo test cross-compile lint types readme
demo: $(INSTALLED)
	$(BIN)/python -P -m dsv3c.benchmarks.demo

test: $(INSTALLED)
	$(BIN)/pytest -n auto --dist worksteal

# For Hopper, GPU or not: each kernel once, as `make test` does, then every configuration that the tuner chooses from.
# Triton keeps results by the hash of what it compiles, so that the next time only what has changed takes time.
cross-compile: $(INSTALLED)
	$(BIN)/pytest -n auto --dist worksteal tests/test_cross_compile.py
	$(BIN)/dsv3c tune --prefilter-only --target h200

lint: $(INSTALLED)
	$(BIN)/ruff check
	$(BIN)/ruff format --check

# mypy cannot see folders that the installation maps into a package: it gets a view of links.
types: $(INSTALLED)
	rm -rf build/view
	mkdir -p build/view/dsv3c
	ln -s $(CURDIR)/dsv3c/* $(addprefix $(CURDIR)/,$(FOLDERS)) build/view/dsv3c/
	$(BIN)/mypy

readme: $(INSTALLED)
	$(BIN)/python -P -m dsv3c.benchmarks.readme_table

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "Python: expected 3.11 or later, found " + sys.version.split()[0] + "; try make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,hf,plot,schedules]'
	touch $@
