# Everything a newcomer runs. The environment is made by whatever needs it.
#
#   make quickstart                     train and quantize on the embedded data, write the report
#   make test                           all tests that need no accelerator and no other framework
#   make test PYTHON=python3.13         the same under another Python
#   make test-slow, test-peers          what takes long, what needs other frameworks
#   make test-aot                       kernels compiled for GPUs and TPUs that are not there, in environments of its own
#   make bench, bench-peers             steps of QAT and QLoRA, and CPU products, over float

PYTHON ?= python3
VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
VENV ?= .venv$(if $(filter-out python3,$(PYTHON)),-$(VERSION))
BIN := $(VENV)/bin
AOT_GPU_PYTHON ?= python3.12
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input install --quiet
export JAX_PLATFORMS ?= cpu

.PHONY: env quickstart test test-slow test-peers test-aot test-aot-tpu test-aot-gpu bench bench-peers lint clean

env: $(VENV)/.dev

$(VENV)/.base: pyproject.toml
	@$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), f"Python {sys.version.split()[0]} is older than 3.11. Run: make PYTHON=<a newer python>"'
	@echo "Creating $(VENV) with Python $(VERSION)"
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) --editable .
	@touch $@

$(VENV)/.dev: $(VENV)/.base
	@echo "Installing what the tests need"
	@$(PIP) --editable '.[dev]'
	@touch $@

$(VENV)/.peers: $(VENV)/.dev
	@$(PIP) --editable '.[peers]'
	@touch $@

quickstart: $(VENV)/.base
	@$(BIN)/qat quickstart --config configs/quickstart.py --workdir runs/quickstart

test: $(VENV)/.dev
	@$(BIN)/ruff check .
	$(BIN)/python -m pytest -n 2 --dist loadfile -m 'not slow and not peers and not aot'

test-slow: $(VENV)/.dev
	$(BIN)/python -m pytest -m slow

test-peers: $(VENV)/.peers
	$(BIN)/python -m pytest -m peers

# libtpu, and CUDA's compiler, for devices that are not there. Budgets hold for these versions. Kernels for Hopper are
# interpreted in the same environment: they need a newer jax than Python 3.11 has.
.venv-aot-tpu/.ready: tests/aot/tpu.txt pyproject.toml
	@$(PYTHON) -m venv .venv-aot-tpu
	@.venv-aot-tpu/bin/python -m pip --disable-pip-version-check --no-input install --quiet -r $< --editable .
	@touch $@

.venv-aot-gpu/.ready: tests/aot/gpu.txt pyproject.toml
	@$(AOT_GPU_PYTHON) -c 'import sys; assert sys.version_info >= (3, 12)' || (echo "The GPU part needs Python 3.12 or newer. Run: make test-aot AOT_GPU_PYTHON=<python3.12>"; exit 1)
	@$(AOT_GPU_PYTHON) -m venv .venv-aot-gpu
	@.venv-aot-gpu/bin/python -m pip --disable-pip-version-check --no-input install --quiet -r $< --editable .
	@touch $@

test-aot: test-aot-tpu test-aot-gpu

test-aot-tpu: .venv-aot-tpu/.ready
	.venv-aot-tpu/bin/python -m pytest -m aot tests/aot/test_tpu.py

test-aot-gpu: .venv-aot-gpu/.ready
	.venv-aot-gpu/bin/python -m pytest -m aot tests/aot/test_gpu.py
	.venv-aot-gpu/bin/python -m pytest $(wildcard tests/kernels/test_*gpu.py) tests/kernels/test_sharded.py

bench: $(VENV)/.base
	@$(BIN)/python -m benchmarks.train_step
	@$(BIN)/python -m benchmarks.finetune_step
	@$(BIN)/python -m benchmarks.cpu_matmul
	@$(BIN)/python -m benchmarks.cpu_decode

bench-peers: $(VENV)/.peers
	@$(BIN)/python -m benchmarks.train_step --peers

lint: $(VENV)/.dev
	@$(BIN)/ruff check .

clean:
	rm -rf .venv* .cache .pytest_cache .ruff_cache build *.egg-info
