# make demo | test | test-all | check | format | docs | sweep | bench NAME=quality     each sets up .venv by itself, once
#
#   test                   everything that CI runs: format, lint, types, docs, tests; test-all: the long tests too
#   check                  everything but the tests
#   docs                   the documentation as HTML, in build/docs
#   sweep                  every architecture of transformers as a tiny model through every stage; writes the page of the
#                          documentation that lists them. NAMES="qwen3* llama" runs some; JOBS=2 at the same time
#
#   NAME=quality_peers     only the peers of NAME=quality, kept for it
#   NAME=ablation, presets, encoding, sequential, proxies   after NAME=quality: what each part, preset, second, order of
#                          work and cost is worth; NAME=planner: the planner beside CBC and HiGHS; NAME=refit (HELD=FILE)
#   NAME=calibration_text  what the calibration text is worth; C4=FILE WIKIPEDIA=FILE TEST=FILE instead of data sets
#   NAME=finetune          fine-tuning, before and after, beside its presets; PARTS=2.0,3.0,qlora runs only these
#   NAME=encoder           a sentence encoder, and classifiers trained over it beside QLoRA, LoftQ and LQ-LoRA (installs PEFT)
#   NAME=cluster           a local Ray cluster that loses workers, beside local processes (installs Ray); BLOCKS=4
#   NAME=gpu_check         on a GPU, in under 8 minutes: device tests, trellis search, kernels, decoding; one JSON file
#   NAME=triton_kernels    our kernels' machine code beside gemlite's and AQLM's; NAME=trellis_search: that of the search
#   NAME=kernels           products on the CPU beside torch, aten and AQLM
#   NAME=decode            after make demo: tokens per second beside llama.cpp
#   NAME=larger_than_memory  the whole job on 8B random weights and on experts within 6 GiB, killed and resumed (40 GB of disk)
#   NAME=smallest_file     after make demo: the demo's file beside llama.cpp's smallest one, on the demo's text
#   NAME=compress          the whole job by reallm compress: time and loss beside encoding everything, and beside GPTQ and AutoRound
#
#   PYTHON=python3.12      another interpreter (3.11 or newer)
#   TORCH_INDEX=URL        where torch comes from; without an NVIDIA GPU, on Linux:
#                          TORCH_INDEX=https://download.pytorch.org/whl/cpu
#   JOBS=2                 test processes
#   TEXT=FILE TEST=FILE    calibration and held-out text of demo and bench, instead of their defaults
#   BUDGET=3.0bpw          what demo plans for (default: 48MiB)
#   PEERS=HQQ,NF4,GPTQ     the peers that NAME=quality measures (default: all; AutoRound takes most of an hour)
#   MODEL=MODEL SPACE=SPACE  what bench compresses (default: the demo's model), and its candidate formats

PYTHON ?= $(firstword $(foreach name,python3.11 python3.12 python3.13 python3,$(shell $(name) -c "print('$(name)')" 2>/dev/null)))
TORCH_INDEX ?=
NAME ?= quality
TEXT ?=
TEST ?=
BUDGET ?=
JOBS ?= 2
NAMES ?=
MODEL ?=
SPACE ?=
PEERS ?=
PRESETS ?=
CHANGES ?=
BLOCKS ?=
C4 ?=
WIKIPEDIA ?=
export JOBS TEXT TEST MODEL SPACE PEERS PRESETS CHANGES BLOCKS C4 WIKIPEDIA

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
BENCH_VENV := .venv-bench
BENCH_READY := $(BENCH_VENV)/.ready
INDEX := $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
SOURCES := reallm kernels planner codegen tests benchmarks examples docs
PYTEST := $(BIN)/pytest -n $(JOBS) --dist loadfile

.DELETE_ON_ERROR:
.PHONY: demo test test-all check format docs sweep bench clean

demo: $(READY)
	$(BIN)/reallm demo $(if $(BUDGET),--budget $(BUDGET)) $(if $(TEXT),--text "$(TEXT)") $(if $(TEST),--test "$(TEST)")

test: check
	$(PYTEST)

test-all: check
	$(PYTEST) -m "long or not long"

check: $(READY)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/mypy
	$(BIN)/python -m sphinx -q -W --keep-going -j $(JOBS) -b html docs build/docs
	$(BIN)/python -m sphinx -q -W --keep-going -b doctest docs build/doctest

format: $(READY)
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

docs: $(READY)
	$(BIN)/python -m sphinx -W --keep-going -j $(JOBS) -b html docs build/docs

sweep: $(READY)
	$(BIN)/python -m benchmarks.architectures $(foreach name,$(NAMES),"$(name)")

bench: $(READY) $(BENCH_READY)
	$(if $(filter cluster,$(NAME)),$(BIN)/pip install --quiet $(INDEX) -c constraints.txt -e ".[ray]")
	$(if $(filter encoder,$(NAME)),$(BIN)/pip install --quiet $(INDEX) -c constraints.txt -e ".[peft]")
	$(BIN)/python -m benchmarks.$(NAME)

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet $(INDEX) -c constraints.txt -e ".[dev,docs]"
	touch $@

$(BENCH_READY): benchmarks/peers.txt
	$(PYTHON) -m venv $(BENCH_VENV)
	$(BENCH_VENV)/bin/pip install --quiet $(INDEX) -r benchmarks/peers.txt
	touch $@

clean:
	rm -rf $(VENV) $(BENCH_VENV) build dist demo
