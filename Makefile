# Every habit of the house as one word. `make` alone lists them.
PYTHON ?= python3
# Extra words for the torch install, e.g. TORCH_ARGS="--index-url ..." for a CPU-only or a CUDA build.
TORCH_ARGS ?=
VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.stamp
JOBS ?= auto
export PYTHONUTF8 = 1

.DEFAULT_GOAL := help
.PHONY: help venv lesson test lab site readme outputs sync bench clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' Makefile

# The stamp is written last: an interrupted build is built again.
$(STAMP): requirements.lock pyproject.toml
	@command -v "$(PYTHON)" >/dev/null || { echo "$(PYTHON) is not on the PATH: Python 3.11 or newer is needed. Try: make PYTHON=python3.12" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(f"Python {sys.version.split()[0]} is too old: 3.11 or newer is needed. Try: make PYTHON=python3.12" if sys.version_info < (3, 11) else 0)'
	@echo "Setting up $(VENV) (once; about a minute plus the downloads) ..."
	@rm -rf $(VENV) && "$(PYTHON)" -m venv $(VENV)
	@$(PY) -m pip install --quiet --disable-pip-version-check "$$(grep '^torch==' requirements.lock)" $(TORCH_ARGS)
	@$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.lock
	@mkdir -p ssl_nb && $(PY) -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $(STAMP)

venv: $(STAMP) ## set up .venv from requirements.lock (the other targets do it by themselves)

lesson: $(STAMP) ## locate a talker: run the quickstart experiment on the embedded speech
	@$(VENV)/bin/ssl-nb run quickstart --profile smoke

test: $(STAMP) ## run every chapter, every experiment at smoke size, and all tests
	@OMP_NUM_THREADS=1 $(PY) -m pytest -n $(JOBS) --dist worksteal

lab: $(STAMP) ## open the chapters in JupyterLab
	@$(PY) -m jupyterlab nbs

site: $(STAMP) ## build the website into _docs (needs Quarto)
	@command -v quarto >/dev/null || { echo "make site needs Quarto, which is not on the PATH. Get it from https://quarto.org/docs/get-started/ (version 1.6 or newer), then run make site again." >&2; exit 1; }
	@PATH="$(CURDIR)/$(VENV)/bin:$$PATH" $(VENV)/bin/nbdev-docs

readme: $(STAMP) ## make README.md from nbs/index.ipynb
	@$(PY) tests/make_readme.py

outputs: $(STAMP) ## run chapters again and store their outputs (NB="nbs/x.ipynb" for one)
	@$(PY) tests/run_notebook.py --inplace $(if $(NB),"$(NB)",)

sync: $(STAMP) ## after editing a notebook: clean it, export the library, make the README
	@$(VENV)/bin/nbdev-clean
	@$(VENV)/bin/nbdev-export
	@$(MAKE) --no-print-directory readme

bench: $(STAMP) ## measure our speed against the named peers (ROWS="gcc rir" for some rows)
	@$(PY) tests/bench.py $(ROWS)

clean: ## remove the environment and everything generated that is not committed
	rm -rf $(VENV) .cache _proc _docs build ./*.egg-info .pytest_cache .hypothesis nbs/nbdev.yml nbs/sidebar.yml
