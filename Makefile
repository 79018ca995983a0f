# make study   the whole study: data, models, compression, evaluation, tables, figures (RECIPE=pocket)
# make test    everything CI runs
RECIPE ?= pocket
PYTHON ?= $(shell command -v python3.11 || command -v python3)
CORES  ?= $(shell nproc 2>/dev/null || sysctl -n hw.ncpu 2>/dev/null || echo 2)
BIN    := .venv/bin
.PHONY: setup study test bases bench soak lab docs export help
.DEFAULT_GOAL := help

help: ## show this
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 18

# the set-up is done when the stamp stands: a killed installation starts again
.venv/installed: settings.ini constraints.txt setup.py
	@test -n "$(PYTHON)" || { echo "make: no python3.11 found; install it or call make PYTHON=/path/to/python3.11"; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || { echo "make: $(PYTHON) is not Python 3.11, for which the pinned packages are known to work together; call make PYTHON=/path/to/python3.11"; exit 2; }
	@echo "Setting up .venv (about 2 GB with PyTorch's CPU build, some minutes) ..."
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@
	@echo "Set up."

setup: .venv/installed ## set up .venv and nothing else (every command does it when it is missing)

study: .venv/installed ## run a study to its tables and figures; RECIPE=smoke for a small one
	@$(BIN)/slm-study run --recipe $(RECIPE) --cores $(CORES)

bases: .venv/installed ## train the two base models of bases/ anew: one to two hours on two cores
	@mkdir -p runs/bases
	@$(BIN)/python -m snakemake bases --snakefile Snakefile --directory runs/bases --cores $(CORES) --config recipe=bases --nolock --rerun-incomplete --quiet host reason

test: .venv/installed ## what CI runs: notebooks as tests, the tree itself, and the pipeline on the smoke recipe
	OMP_NUM_THREADS=1 $(BIN)/nbdev_test --n_workers $(CORES) --skip_folder_re '^[_.]|^studies$$'
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest

bench: .venv/installed ## the parts beside what one would use instead, in one run (minutes)
	@$(BIN)/slm-study bench

soak: .venv/installed ## 10,000 tasks run again, 10,000 programs, 2 % of them hostile, and 50 kills of the driver (minutes)
	@$(BIN)/python tests/all_tasks.py
	@$(BIN)/python tests/soak.py

lab: .venv/installed ## open the notebooks in JupyterLab
	@$(BIN)/jupyter lab nbs/index.ipynb

docs: .venv/installed ## the notebooks as a web site, in _docs; needs Quarto
	@command -v quarto >/dev/null || { echo "make: docs needs Quarto, which renders the pages; install it (quarto.org) and call make docs again"; exit 2; }
	@$(BIN)/python tests/readme.py
	@$(BIN)/nbdev_docs

export: .venv/installed ## notebooks to modules and README, notebooks cleaned: after every edit
	@$(BIN)/nbdev_export
	@$(BIN)/nbdev_clean
	@$(BIN)/python tests/readme.py
