# Every target sets up what it needs in .venv; `make help` lists them.

PYTHON ?= python3
BIN := .venv/bin

# The demo: a folder of a model instead of the shipped one, further options of `psdiff demo`.
BUNDLE ?=
DEMO_OUT ?= demo-out
DEMO_FLAGS ?=

# Tests: for example `make test PYTEST_FLAGS="-m 'not slow'"`.
PYTEST_FLAGS ?=

# Training the shipped model again: imagenet, or a .pth file with torchvision's names.
BACKBONE_WEIGHTS ?= imagenet
RECIPE ?= training/recipes/psdiff_mobile.yaml
RANKS ?= 2
TRAIN_OUT ?= psdiff-train

# Stamps: an install is repeated when what it was made from is newer.
BASE := .venv/.base-installed
DEV := .venv/.dev-installed
SETUP := deploy/setup-venv.sh pyproject.toml setup.py
export PYTHON

.DEFAULT_GOAL := help
.PHONY: help demo test check setup setup-base bench train-demo clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' Makefile

demo: $(BASE)  ## find a person in another camera, on two synthetic clips (no PyTorch needed)
	$(BIN)/psdiff demo --out $(DEMO_OUT) $(if $(BUNDLE),--bundle $(BUNDLE)) $(DEMO_FLAGS)

test: $(DEV)  ## run every test that this machine can run; a skip says what is missing
	@deploy/setup-venv.sh rtsp
	$(BIN)/python -m pytest $(PYTEST_FLAGS)

check: $(DEV)  ## ruff, ruff format, pyright, and the rules of tests/test_architecture.py
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/python -m pytest -q tests/test_architecture.py

setup: $(DEV)  ## install everything: training, export, tests, checkers (PyTorch: some GB)

setup-base: $(BASE)  ## install what running needs, without PyTorch

bench: $(DEV)  ## measure detection and training: tables, and JSON in benchmarks/results
	$(BIN)/python benchmarks/bench_detect.py
	$(BIN)/python benchmarks/bench_train.py

train-demo: $(DEV)  ## train, export and score the shipped model again (hours on two cores)
	$(BIN)/torchrun --nproc-per-node $(RANKS) -m psdiff train --recipe $(RECIPE) \
		--backbone-weights $(BACKBONE_WEIGHTS) --out $(TRAIN_OUT)
	$(BIN)/psdiff export $(TRAIN_OUT)/model.safetensors $(TRAIN_OUT)/psdiff_mobile
	$(BIN)/psdiff evaluate $(TRAIN_OUT)/psdiff_mobile --calibrate --record

clean:  ## remove caches, build output and what the demo wrote; .venv stays
	rm -rf build *.egg-info .pytest_cache .ruff_cache $(DEMO_OUT)
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

$(BASE): $(SETUP)
	@echo "installing psdiff into .venv ..."
	@deploy/setup-venv.sh base
	@touch $@

# The full install holds the base one: after it, `make demo` has nothing to install.
$(DEV): $(SETUP)
	@echo "installing psdiff with PyTorch and the tools into .venv; this takes minutes ..."
	@deploy/setup-venv.sh dev
	@touch $(BASE) $@
