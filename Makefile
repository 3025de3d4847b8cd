# Everything happens in .venv; nothing outside this folder is touched.
PYTHON ?= python3
CORES ?= 2
BIN := .venv/bin
export HF_HUB_DISABLE_TELEMETRY := 1
# Without compiled modules, every job compiles torch and transformers anew: ten seconds. To compile all that pip installs
# takes minutes, so Python compiles what it imports, once.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-fast check format dag clean

help:  ## say what there is
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: .venv/ready slurm  ## install everything into .venv (once)

.venv/ready: pyproject.toml envs/constraints.txt envs/demo.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else f"python3: {sys.version.split()[0]}. Expected 3.11 or newer. Run make PYTHON=/path/to/a/newer/python3.")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --no-compile --constraint envs/constraints.txt --editable '.[dev,serve,clients]'
	$(BIN)/python -m pip install --quiet --no-compile --no-deps --require-hashes --requirement envs/demo.txt
	$(BIN)/python -c "import torch._dynamo, transformers.models.llama.modeling_llama, sklearn.feature_extraction.text, pyarrow.parquet, snakemake.cli"
	@touch $@

# Snakemake looks for a profile by its name in this folder, and for nothing else that lies here.
slurm:  ## the short name of profiles/slurm, for snakemake --profile slurm
	ln -s profiles/slurm slurm

demo: setup  ## the whole pipeline on the built-in corpus (config.yaml), into results/
	$(BIN)/snakemake --cores $(CORES) $(ARGS)

# Those on a real Slurm wait more than they compute, so they run beside the others; what they print comes last.
# One thread each: threads of several processes wait for each other, and burn the time.
test: export OMP_NUM_THREADS := 1
test: setup  ## all tests; those on a real Slurm where its packages are or can be installed (root, apt-get)
	@SHARED_BY_TESTS=$$(mktemp -d); export SHARED_BY_TESTS; trap 'rm -rf "$$SHARED_BY_TESTS"' EXIT; \
	$(BIN)/python -m pytest tests/slurm >slurm-tests.log 2>&1 & slurm=$$!; \
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --ignore=tests/slurm; status=$$?; \
	wait $$slurm || status=1; cat slurm-tests.log; exit $$status

test-fast: setup  ## the fast tests, in parallel: under two minutes
	$(BIN)/python -m pytest -q -n auto --dist loadfile -m "not slow" --ignore=tests/slurm

check: setup  ## formatting, lint, types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/snakefmt --check workflow
	$(BIN)/pyright
	$(BIN)/snakemake --lint

format: setup  ## format the code
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(BIN)/snakefmt workflow

dag: setup  ## draw the rules as docs/rulegraph.svg (needs graphviz)
	$(BIN)/snakemake --rulegraph | dot -Tsvg > docs/rulegraph.svg

clean:  ## delete the demo's results
	rm -rf results .snakemake
