# Everything a user needs; a bare `make` says what there is.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PLAYWRIGHT := $(VENV)/.playwright
SPHINX := $(VENV)/.sphinx
OUT ?= outputs/train.ipynb
ARGS ?=
RUN ?= best
# Another torch than the tested one, in an environment of its own: make test TORCH=2.6.0 VENV=.venv-oldest
TORCH ?=
# Each torch brings the sympy that it wants.
PINS := sed $(if $(TORCH),-e '/^sympy==/d' -e 's/^torch==.*/torch==$(TORCH)/') -e '' constraints.txt
PIP := $(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check -c $(VENV)/constraints.txt
NOTEBOOKS := $(or $(shell git ls-files "notebooks/*.ipynb" 2>/dev/null),$(wildcard notebooks/*.ipynb))
# Those that train come first: the others find their runs, and need not train one of their own.
FIRST := notebooks/train.ipynb notebooks/progressive.ipynb
# Imported modules are compiled once and not by every process: half of an import's time.
export PYTHONDONTWRITEBYTECODE :=

.DEFAULT_GOAL := help
.PHONY: help env train test slow nightly coverage docs lint browser chromium gallery lab settings nbdime bench release clean

help: ## say what there is
	@echo "refinelib: NaN-safe training of boundary-refined person masks"
	@echo
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-8s %s\n", $$1, $$2}'
	@echo
	@echo '  make train ARGS="-p lr 5e-6"      passes parameters on; make train ARGS="-f params/stable.yaml" takes a recipe'

env: $(READY) ## make the environment (.venv) with the tested versions

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "refinelib needs Python 3.11 or newer and $(PYTHON) is $$($(PYTHON) --version): make PYTHON=python3.12 ..."; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || \
	  { echo "$(PYTHON) -m venv failed: on Debian and Ubuntu, apt install python3-venv"; exit 1; }
	@echo "installing into $(VENV) (the first time takes some minutes)"
	@$(PINS) > $(VENV)/constraints.txt
	@$(PIP) -e ".[test]"
	@touch $@

train: $(READY) ## train on synthetic people, headless: notebooks/train.ipynb through papermill
	@mkdir -p $(dir $(OUT))
	@$(BIN)/papermill notebooks/train.ipynb $(OUT) --kernel python3 --no-progress-bar --log-level WARNING --stdout-file - $(ARGS)

test: $(READY) ## pass every test; nbval executes the notebooks in smoke size
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m "not browser and not slow" -n auto --dist worksteal -p no:nbval
	@OMP_NUM_THREADS=1 REFINELIB_SMOKE=1 $(BIN)/python -m pytest -q -n auto --dist loadfile \
	  --nbval-lax --nbval-cell-timeout=600 -p no:cacheprovider $(FIRST) $(filter-out $(FIRST),$(NOTEBOOKS))

slow: $(READY) ## pass the tests that `make test` leaves out for their time
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m slow -n auto --dist worksteal -p no:nbval $(ARGS)

nightly: slow browser ## pass what is too slow for every change: slow tests (the mutations are some), notebooks in a browser

coverage: $(READY) ## report the lines and branches of refinelib that the tests of `make test` reach; pages in outputs/coverage
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m "not browser and not slow" -n auto --dist worksteal -p no:nbval \
	  --cov --cov-report=term:skip-covered --cov-report=html $(ARGS)

docs: $(SPHINX) ## make the reference and the executed notebooks into pages, in outputs/docs
	@$(BIN)/sphinx-build --quiet --fail-on-warning --keep-going -c docs . outputs/docs
	@echo "open outputs/docs/docs/index.html"

$(SPHINX): $(READY)
	@$(PIP) -e ".[docs]"
	@touch $@

lint: $(READY) ## check format, style and types
	@$(BIN)/ruff format --check --quiet refinelib studies tests bench gallery examples docs setup.py || { echo "run: $(BIN)/ruff format"; exit 1; }
	@$(BIN)/ruff check --quiet refinelib studies tests bench gallery examples docs setup.py
	@$(BIN)/mypy refinelib

gallery: $(READY) ## execute the notebooks into gallery/, for readers on the web
	@$(BIN)/python gallery/make.py $(ARGS)

browser: $(PLAYWRIGHT) chromium ## pass every notebook (ARGS="-k train": some) in JupyterLab, in a headless Chromium; pictures of the pages in outputs/browser
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m browser -n 2 --dist worksteal -p no:cacheprovider $(ARGS) tests/browser

$(PLAYWRIGHT): $(READY)
	@$(PIP) -e ".[browser]"
	@touch $@

chromium:
	@if ! $(BIN)/python tests/browser/lab.py >/dev/null 2>&1; then \
	  if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	    echo "installing Chromium" && apt-get -qq update && \
	    DEBIAN_FRONTEND=noninteractive apt-get -qq install --no-install-recommends chromium fonts-dejavu-core >/dev/null; \
	  fi; \
	  $(BIN)/python tests/browser/lab.py; \
	fi

lab: $(READY) ## open JupyterLab on the notebooks; ARGS go on to it
	@$(BIN)/jupyter lab --notebook-dir=notebooks $(if $(filter 0,$(shell id -u)),--allow-root) $(ARGS)

settings: $(READY) ## write the settings into the parameter cell of notebooks/train.ipynb, after a change of them
	@$(BIN)/python -c 'import nbformat; from refinelib.config import parameters_cell; \
	  file = "notebooks/train.ipynb"; notebook = nbformat.read(file, 4); \
	  next(cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])).source = parameters_cell(); \
	  nbformat.write(notebook, file)'

nbdime: $(READY) ## let git show and merge notebooks cell by cell, as .gitattributes asks for
	@$(BIN)/nbdime config-git --enable

bench: $(READY) ## measure the data path
	@$(BIN)/python bench/store.py

release: $(READY) ## pack a finished run (RUN=best) as a release file: weights, settings, card
	@$(BIN)/python bench/release.py $(RUN) $(ARGS)

clean: ## remove the environment; outputs stay
	rm -rf $(VENV) *.egg-info .pytest_cache
