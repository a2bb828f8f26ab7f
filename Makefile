# make demo    the whole loop on synthetic speech, some minutes on a laptop
# make test    the tests
# make fuzz    100,000 damaged files, shared out among all readers
# make chaos   kills, full disks and the like, 45 minutes: the tables of docs/RELIABILITY.md
# make soak    an hour of training: memory, files and time as it goes on
# make lint    format, style and types
# Each sets up .venv first, from python3 alone, unless that is done.

PYTHON ?= python3
EXTRAS ?= demo,test
WORKDIR ?= work/demo
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test fuzz chaos soak lint clean

demo: $(VENV)/installed
	PATH="$(CURDIR)/$(BIN):$$PATH" launch/local.sh run --config=configs/demo.py --workdir=$(WORKDIR)

test: $(VENV)/installed
	@echo 'without tests/parity, which needs torch and transformers (.ci/run installs them)'
	$(BIN)/python -m pytest -n 2 --dist loadfile --ignore=tests/parity -m 'not plan and not several_processes'

fuzz: $(VENV)/installed
	$(BIN)/python -m tests.fuzz.run

chaos: $(VENV)/installed
	$(BIN)/python -m tests.chaos.run
	$(BIN)/python -m tests.chaos.run --processes=2 --minutes=15

soak: $(VENV)/installed
	$(BIN)/python -m tests.chaos.soak

lint: $(VENV)/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/shellcheck launch/*.sh tests/slurm/*.sh

clean:
	rm -rf $(VENV) work/demo

$(VENV)/installed: setup.py
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[$(EXTRAS)]'
	touch $@
