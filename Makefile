PYTHON ?= python3
VENV ?= .venv
PY = $(VENV)/bin/python
# Programs compiled by one command of the demo serve the next.
export JAX_COMPILATION_CACHE_DIR ?= $(CURDIR)/runs/.jax-cache
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS ?= 0.3

.PHONY: demo test test-slow lint clean

demo: $(VENV)/.demo
	$(PY) -m train.families --out runs/demo/log --rows-per-family 160 --split train
	$(PY) -m train.families --out runs/demo/eval --rows-per-family 6 --split eval
	$(PY) -m train --config configs/demo.py --prompts runs/demo/log --out runs/demo
	$(PY) -m decode.bench --pool runs/demo/pool --prompts runs/demo/eval --json runs/demo/bench.json --methods base mixed routed
	$(PY) -m decode.report --bench runs/demo/bench.json --out runs/demo/report

# Compiling is most of the time of a test: code is made quickly here; test-slow runs what ships.
test: export XLA_FLAGS = --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true
test: $(VENV)/.test
	$(PY) -m pytest -q -m "not slow" -n 2 --dist loadfile --no-loadscope-reorder

test-slow: $(VENV)/.test
	$(PY) -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder

lint: $(VENV)/.test
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(VENV)/bin/basedpyright --pythonpath $(PY)

$(VENV)/.demo: pyproject.toml
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check -e .
	touch $@

$(VENV)/.test: $(VENV)/.demo
	$(PY) -m pip install --quiet --disable-pip-version-check -e ".[test]"
	touch $@

clean:
	rm -rf runs/demo $(VENV)
