# Every command makes the virtual environment .venv first if it is not there, or is out of date.
VENV := .venv
PYTHON ?= python3
RUN := $(VENV)/bin/python
READY := $(VENV)/.installed
# The versions installed, in place of a constraint that this machine's pip may have.
CONSTRAINTS ?= constraints/default.txt
INSTALL := PIP_CONSTRAINT=$(CONSTRAINTS) $(VENV)/bin/pip install -q
NATIVE := setup.py pyproject.toml $(shell find csrc -type f 2>/dev/null)

.PHONY: help demo test slow versions bench lint gpu clean
.DEFAULT_GOAL := help

help:  ## show this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

demo: $(READY)  ## a small study: a real ViT fine-tuned on three tasks and merged, with its report (5 minutes)
	$(VENV)/bin/tangentfast study run --preset demo --out demo-output

test: $(READY)  ## run the tests (7 minutes)
	$(RUN) -m pytest -q -m "not slow"

slow: $(READY)  ## run the tests that `make test` leaves out (3 minutes)
	$(RUN) -m pytest -q -m slow

versions: $(READY)  ## run the tests against the oldest and the newest versions, each in an environment of its own
	$(VENV)/bin/nox

bench: $(READY)  ## run the benchmarks (10 minutes) and rewrite docs/benchmarks.md from them
	results=$$($(RUN) benchmarks/machine.py) && \
	$(RUN) -m pytest benchmarks --benchmark-only --benchmark-quiet -q --benchmark-json=$$results && \
	$(RUN) benchmarks/document.py

lint: $(READY)  ## format check, lint and types
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

# No virtual environment is made here, which would want the network: one that is there is used.
gpu: GPU_PYTHON ?= $(if $(wildcard $(RUN)),$(RUN),$(PYTHON))
gpu:  ## on a machine with an NVIDIA GPU: build, test and measure (9 minutes); STAGES="build test" for some
	$(GPU_PYTHON) benchmarks/gpu.py $(STAGES)

clean:  ## remove what was built, but not what was downloaded
	rm -rf $(VENV) .nox build dist *.egg-info tangentfast/_C*.so demo-output

# torch first: the extension is built against it.
$(VENV)/.libraries: pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) --upgrade pip
	$(INSTALL) "setuptools>=77" wheel ninja pybind11 numpy torch torchvision
	touch $@

$(READY): $(VENV)/.libraries $(NATIVE)
	$(INSTALL) --no-build-isolation -e ".[models,study,bench,test,dev]"
	touch $@
