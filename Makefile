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

# Small models train faster on a core each than on two in turn; a GPU takes one at a time.
BESIDE  := $(if $(shell command -v nvidia-smi),,--jobs 2)

BIN     := .venv/bin
STAMP   := .venv/installed
OLDEST  := .venv-oldest
PIP     := $(BIN)/python -m pip --quiet --disable-pip-version-check
INSTALL := $(PIP) install --constraint constraints.txt
# "torch" -> "torch==2.13.0": constraints.txt is the only place that knows.
pin      = $(shell sed -n 's/^$(1)==[^; ]*/&/p' constraints.txt)

.DEFAULT_GOAL := help
.PHONY: help install hashes demo ladder gpu docs lint test test-all test-oldest clean

help:
	@echo 'make install   make .venv with the versions that are tested'
	@echo 'make demo      NF4 against 16 bits on a stand-in, with a report: no GPU, no network'
	@echo 'make ladder    five precisions on a stand-in, from 16 bits to 4, in one report'
	@echo 'make gpu       what only a GPU can show, in under ten minutes, written into docs/gpu.md'
	@echo 'make docs      build the site of README, docs and docstrings in site/'
	@echo 'make hashes    write constraints-hashes.txt anew; make install HASHES=1 installs nothing else'
	@echo 'make lint      check style, formatting and types'
	@echo 'make test      lint, then the tests'
	@echo 'make test-all     make test, and the tests that take minutes'
	@echo 'make test-oldest  the tests with the oldest versions of the ranges, in .venv-oldest'
	@echo 'make clean     remove both .venv, caches and what was built; runs/ stays'
	@echo 'Each installs what it needs first. Another Python than $(PYTHON): make PYTHON=python3.12 install'

install: $(STAMP)

# torch goes first and by its exact version: asked for more loosely, pip may take another build of it, with several
# GB of CUDA packages. The build constraint is for the dependencies that come as source; the warnings are setuptools'
# general advice on editable installations.
# With HASHES=1 nothing is installed but what has a hash in constraints-hashes.txt. The pinned pip, which takes hashes
# from constraints, and setuptools, which packages that come as source are built with, go first. Then torch: asked with
# hashes, pip would rather have PyPI's build than one from a folder or an index without, so it chooses without them.
ifdef HASHES
$(STAMP): setup.cfg constraints-hashes.txt | $(BIN)/python
	@echo 'Installing into .venv by hash; the first time this takes some minutes.'
	sed -n '/^pip==/,/[^\\]$$/p; /^setuptools==/,/[^\\]$$/p' constraints-hashes.txt > .venv/first.txt
	sed -n '/^torch==/,/[^\\]$$/p' constraints-hashes.txt > .venv/torch.txt
	$(PIP) install --require-hashes --requirement .venv/first.txt
	$(PIP) download --no-deps --only-binary :all: --dest .venv/torch $(call pin,torch)
	$(PIP) install --no-deps --no-index --find-links .venv/torch --require-hashes --requirement .venv/torch.txt
	rm -r .venv/torch
	PYTHONWARNINGS=ignore::UserWarning $(PIP) install --constraint constraints-hashes.txt --no-require-hashes \
	  --no-build-isolation --editable '.[test]'
	$(BIN)/python .ci/hashes.py --installed
	@touch $@
else
$(STAMP): setup.cfg constraints.txt | $(BIN)/python
	@echo 'Installing into .venv; the first time this takes some minutes.'
	$(INSTALL) $(call pin,pip)
	$(INSTALL) $(call pin,torch)
	PYTHONWARNINGS=ignore::UserWarning $(INSTALL) --build-constraint constraints.txt --editable '.[test]'
	@touch $@
endif

# Needed when constraints.txt changes; asks the index, and downloads nothing.
hashes: $(STAMP)
	$(BIN)/python .ci/hashes.py

$(BIN)/python:
	@command -v $(PYTHON) >/dev/null || { \
	  echo 'There is no $(PYTHON) here. Name a Python, 3.11 or newer: make PYTHON=python3.12 install' >&2; exit 2; }
	@$(PYTHON) -c '$(NEW_ENOUGH)' || { \
	  echo "$(PYTHON) is `$(PYTHON) --version 2>&1`, and TRL 1.16 needs 3.11 or newer." \
	    'Name another: make PYTHON=python3.12 install' >&2; exit 2; }
	$(PYTHON) -m venv .venv

# Both arms, their evaluation and the report; run again, it does what is missing.
demo: $(STAMP)
	$(BIN)/python eval/benchmark.py $(RECIPE) --demo --precisions nf4 bf16 --seeds 0 $(BESIDE)

# The same for every precision that is stored another way; the first is the baseline.
ladder: $(STAMP)
	$(BIN)/python eval/benchmark.py $(RECIPE) --demo --precisions bf16 int8 nf4 nf4-single fp4 --seeds 0 $(BESIDE) \
	  --output runs/$(basename $(notdir $(RECIPE)))-demo/ladder

# Goes on after a failure; without a GPU it takes small models through the same programs.
gpu: $(STAMP)
	mkdir -p runs
	$(BIN)/python eval/on_gpu.py --json runs/gpu.json --markdown docs/gpu.md

# A link that leads nowhere fails the build. The variable silences advice about the builder's successor.
docs: $(STAMP)
	$(INSTALL) --editable '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --site-dir site
	@echo 'site/index.html'

lint: $(STAMP)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

# A file's tests stay in one process, so that what they share is made once.
test: lint
	$(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile

# The same and what takes minutes.
test-all: lint
	$(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile -m ''

test-oldest: $(OLDEST)/installed
	$(OLDEST)/bin/python -m pytest --numprocesses $(WORKERS) --dist loadfile

$(OLDEST)/installed: setup.cfg constraints-oldest.txt | $(BIN)/python
	$(BIN)/python -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip --quiet --disable-pip-version-check install $(call pin,pip)
	PYTHONWARNINGS=ignore::UserWarning $(OLDEST)/bin/python -m pip --quiet --disable-pip-version-check \
	  install --constraint constraints-oldest.txt --editable '.[test]'
	@touch $@

clean:
	rm -rf .venv $(OLDEST) build dist site *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
