# Every target sets up what it needs in .venv; `make help` lists them.

PYTHON ?= python3
BIN := .venv/bin

# The demo: a folder of a model instead of the shipped one, further options of `psdiff demo`.
BUNDLE ?=
DEMO_OUT ?= demo-out
DEMO_FLAGS ?=

# Tests: for example `make test PYTEST_FLAGS="-m 'not slow'"`.
# Files of tests are spread over TEST_WORKERS processes, with one thread of arithmetic each, in the order that
# tests/conftest.py gives them. Three for two cores: those with cameras mostly wait.
PYTEST_FLAGS ?=
TEST_WORKERS ?= 3

# Training the shipped model again: imagenet, or a .pth file with torchvision's names.
BACKBONE_WEIGHTS ?= imagenet
RECIPE ?= training/recipes/psdiff_mobile.yaml
RANKS ?= 2
TRAIN_OUT ?= psdiff-train

# The CUDA kernels for TensorRT: architectures, and the folder of NvInferRuntime.h. JetPack 6: PLUGIN_SMS=87.
NVCC ?= nvcc
TENSORRT_INCLUDE ?=
PLUGIN_SMS ?= 80 86 87 89 90 100 110 120
PLUGIN_CODE = $(foreach sm,$(PLUGIN_SMS),-gencode arch=compute_$(sm),code=sm_$(sm)) \
	-gencode arch=compute_$(lastword $(PLUGIN_SMS)),code=compute_$(lastword $(PLUGIN_SMS))

# Stamps: an install is repeated when what it was made from is newer.
BASE := .venv/.base-installed
DEV := .venv/.dev-installed
SETUP := deploy/setup-venv.sh pyproject.toml setup.py
TRITON := .venv-triton/.installed
export PYTHON

.DEFAULT_GOAL := help
.PHONY: help demo test test-gpu check setup setup-base triton-server kernels trt-plugin bench bench-gpu train-demo clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' Makefile

demo: $(BASE)  ## find a person in another camera, on two synthetic clips (no PyTorch needed)
	$(BIN)/psdiff demo --out $(DEMO_OUT) $(if $(BUNDLE),--bundle $(BUNDLE)) $(DEMO_FLAGS)

test: $(DEV) $(TRITON)  ## run every test that this machine can run; a skip says what is missing
	@deploy/setup-venv.sh rtsp
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(TEST_WORKERS) --dist loadfile --no-loadscope-reorder $(PYTEST_FLAGS)

test-gpu: kernels  ## run the tests that need a CUDA device
	$(BIN)/python -m pytest -m gpu $(PYTEST_FLAGS)

check: $(DEV)  ## ruff, ruff format, pyright, and the rules of tests/test_architecture.py
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/python -m pytest -q tests/test_architecture.py

setup: $(DEV)  ## install everything: training, export, tests, checkers (PyTorch: some GB)

setup-base: $(BASE)  ## install what running needs, without PyTorch

triton-server: $(TRITON)  ## a tritonserver in .venv-triton, for the tests that ask a real one

kernels: $(DEV)  ## build the CUDA kernels for PyTorch (nvcc; TORCH_CUDA_ARCH_LIST=9.0 for one GPU)
	PSDIFF_CUDA=1 $(BIN)/python -m pip install --no-build-isolation --no-deps -e .

trt-plugin:  ## build/libpsdiff_trt.so, the TensorRT plugins (nvcc, TENSORRT_INCLUDE=folder of NvInferRuntime.h)
	@test -f "$(TENSORRT_INCLUDE)/NvInferRuntime.h" || \
		{ echo "TENSORRT_INCLUDE must be the folder of NvInferRuntime.h, got '$(TENSORRT_INCLUDE)'"; exit 2; }
	@mkdir -p build
	@printf '{ global: getCreators; setLoggerFinder; local: *; };\n' > build/trt_plugin.exports
	$(NVCC) -std=c++17 -O3 -shared -cudart static \
		-Xcompiler -fPIC,-fvisibility=hidden -Xlinker --version-script=build/trt_plugin.exports \
		-isystem $(TENSORRT_INCLUDE) -I kernels/csrc $(PLUGIN_CODE) \
		kernels/csrc/trt_plugin.cu -o build/libpsdiff_trt.so.part
	@mv build/libpsdiff_trt.so.part build/libpsdiff_trt.so

bench: $(DEV)  ## measure detection and training: tables, and JSON in benchmarks/results
	$(BIN)/python benchmarks/bench_detect.py
	$(BIN)/python benchmarks/bench_train.py

bench-gpu: kernels  ## measure kernels and networks on a CUDA device: a table, and JSON in benchmarks/results
	$(BIN)/python benchmarks/bench_kernels.py
	$(BIN)/python benchmarks/bench_gpu.py

train-demo: $(DEV)  ## train, export and score the shipped model again (hours on two cores)
	$(BIN)/torchrun --nproc-per-node $(RANKS) -m psdiff train --recipe $(RECIPE) \
		--backbone-weights $(BACKBONE_WEIGHTS) --out $(TRAIN_OUT)
	$(BIN)/psdiff export $(TRAIN_OUT)/model.safetensors $(TRAIN_OUT)/psdiff_mobile
	$(BIN)/psdiff evaluate $(TRAIN_OUT)/psdiff_mobile --calibrate --record

clean:  ## remove caches, build output and what the demo wrote; .venv and .venv-triton stay
	rm -rf build *.egg-info .pytest_cache .ruff_cache $(DEMO_OUT)
	find . -name __pycache__ -not -path './.venv*/*' -prune -exec rm -rf {} +

$(BASE): $(SETUP)
	@echo "installing psdiff into .venv ..."
	@deploy/setup-venv.sh base
	@touch $@

$(TRITON): $(SETUP)
	@echo "installing a tritonserver into .venv-triton ..."
	@deploy/setup-venv.sh triton
	@touch $@

# The full install holds the base one: after it, `make demo` has nothing to install.
$(DEV): $(SETUP)
	@echo "installing psdiff with PyTorch and the tools into .venv; this takes minutes ..."
	@deploy/setup-venv.sh dev
	@touch $(BASE) $@
