# Every chore is one command, and each first makes .venv when it is missing or older than what it is made from.
#
# pip takes an index, a proxy or a folder of wheels from its own settings (PIP_INDEX_URL, PIP_FIND_LINKS, ...).
# On Linux, PyPI's torch is the CUDA build: without a GPU, name PyTorch's CPU index in PIP_EXTRA_INDEX_URL.

# TRL 1.16 and Transformers 5.23 need Python 3.11; the first of these that is new enough is taken.
NEW_ENOUGH = import sys; sys.exit(sys.version_info < (3, 11))
PYTHON  ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
             $$p -c '$(NEW_ENOUGH)' 2>/dev/null && echo $$p && exit; done; echo python3)
RECIPE  ?= recipes/llama2_guanaco.py
# Processes that the tests are spread over; each needs about 1.5 GB.
WORKERS ?= 2

BIN     := .venv/bin
STAMP   := .venv/installed
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
# "torch" -> "torch==2.13.0": constraints.txt is the only place that knows.
pin      = $(shell sed -n 's/^$(1)==[^; ]*/&/p' constraints.txt)

.DEFAULT_GOAL := help
.PHONY: help install hashes demo lint test

help:
	@echo 'make install   make .venv with the versions that are tested'
	@echo 'make demo      NF4 against 16 bits on a stand-in, with a report: no GPU, no network'
	@echo 'make hashes    write constraints-hashes.txt; make install HASHES=1 installs nothing else'
	@echo 'make lint      check style and formatting'
	@echo 'make test      lint, then the tests'
	@echo 'Each installs what it needs first. Another Python than $(PYTHON): make PYTHON=python3.12 install'

install: $(STAMP)

# torch goes first and by its exact version: asked for more loosely, pip may take another build of it, with several
# GB of CUDA packages. The build constraint is for the dependencies that come as source; the warnings are setuptools'
# general advice on editable installations.
# With HASHES=1 every archive has the hash that `make hashes` wrote down, and none is looked for beyond those: what was
# installed then is installed now, or nothing is. setuptools goes first, since packages that come as source need it.
ifdef HASHES
HASHED := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation
$(STAMP): setup.cfg constraints-hashes.txt | $(BIN)/python
	grep '^setuptools==' constraints-hashes.txt > .venv/first.txt
	$(HASHED) --require-hashes --requirement .venv/first.txt
	$(HASHED) --require-hashes --requirement constraints-hashes.txt
	$(HASHED) --editable .
	@touch $@
else
$(STAMP): setup.cfg constraints.txt | $(BIN)/python
	@echo 'Installing into .venv; the first time this takes some minutes.'
	$(INSTALL) $(call pin,pip)
	$(INSTALL) $(call pin,torch)
	PYTHONWARNINGS=ignore::UserWarning $(INSTALL) --build-constraint constraints.txt --editable '.[test]'
	@touch $@
endif

# For this Python on this kind of machine: an index has one archive for each, and each has its own hash.
hashes: | $(BIN)/python
	$(INSTALL) $(call pin,pip)
	$(INSTALL) --dry-run --ignore-installed --report .venv/report.json $(call pin,torch) $(call pin,setuptools) '.[test]'
	$(BIN)/python .ci/hashes.py < .venv/report.json > constraints-hashes.txt

constraints-hashes.txt:
	@echo 'There is no constraints-hashes.txt yet: make hashes writes it, to be read and kept.' >&2; exit 2

$(BIN)/python:
	@command -v $(PYTHON) >/dev/null || { \
	  echo 'There is no $(PYTHON) here. Name a Python, 3.11 or newer: make PYTHON=python3.12 install' >&2; exit 2; }
	@$(PYTHON) -c '$(NEW_ENOUGH)' || { \
	  echo "$(PYTHON) is `$(PYTHON) --version 2>&1`, and TRL 1.16 needs 3.11 or newer." \
	    'Name another: make PYTHON=python3.12 install' >&2; exit 2; }
	$(PYTHON) -m venv .venv

# Both arms, their evaluation and the report; run again, it goes on with what is missing.
demo: $(STAMP)
	$(BIN)/python eval/benchmark.py $(RECIPE) --demo --precisions nf4 bf16 --seeds 0

lint: $(STAMP)
	$(BIN)/ruff check
	$(BIN)/ruff format --check

# A file's tests stay in one process, so that what they share is made once.
test: lint
	$(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile
