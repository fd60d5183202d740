# Two commands do everything on a fresh machine: `make pretrain` and `make test`.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin

# Keep the working directory off sys.path: kernels/ would shadow the Hugging Face package of that name.
export PYTHONSAFEPATH := 1

.PHONY: help pretrain test test-slow test-real test-tensorflow gpu-check gpu-check-quick aot triton-versions soak fuzz bench figures readme lint format clean
help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# The stamps record which extras are installed.
$(VENV)/.train: setup.py constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[train,plot]'
	@touch $@
$(VENV)/.dev: $(VENV)/.train
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

data/pydocs/manifest.json: | $(VENV)/.train
	$(BIN)/fusebert prepare --corpus pydocs --out data/pydocs --vocab-size 8192 --max-bytes 48MB

pretrain: $(VENV)/.train data/pydocs/manifest.json  ## install, prepare the installed packages' docstrings, pretrain a small BERT
	$(BIN)/fusebert pretrain --data data/pydocs --out runs/pydocs --recipe fast --minutes 5 --resume

test: $(VENV)/.dev  ## install and run the tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile

test-slow: $(VENV)/.dev  ## the tests that take minutes each, which `make test` leaves out
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow

test-real: $(VENV)/.dev  ## the tests with real weights (all-MiniLM-L6-v2, from the package index)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/model/test_real_weights.py

test-tensorflow: $(VENV)/.dev  ## the tests of `convert`, with TensorFlow in place of the stand-in of `make test`
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[tensorflow]'
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/train/tasks/test_convert.py

# ttsem's metadata names a Python and a torch that are not ours; it needs neither.
$(VENV)/.gpu-check: constraints.txt | $(VENV)/.dev
	$(BIN)/python -m pip install --quiet --no-deps --ignore-requires-python --constraint constraints.txt ttsem
	@touch $@

GPU_CHECKED := tests/kernels tests/gpu tests/model/fusion/test_fuse.py tests/model/fusion/test_attention_interface.py
GPU_CHECK := OMP_NUM_THREADS=1 $(BIN)/python -m ttsem.sanitize pytest -p no:logging
gpu-check: $(VENV)/.gpu-check  ## the kernels' tests as on a GPU, compiled for sm_90 and run on a CPU
	$(GPU_CHECK) $(GPU_CHECKED)

gpu-check-quick: $(VENV)/.gpu-check  ## the part of gpu-check that .ci/run includes
	$(GPU_CHECK) -q -m gpu_check_quick $(GPU_CHECKED)

# Every Triton that setup.py allows, each in a folder of its own that comes before the installed one. TRITONS=3.9.0 takes one.
TRITONS ?= 3.6.0 3.8.0 3.9.0
ARCHS ?= 80 90 100 120
build/triton-%/triton: | $(VENV)/.dev
	$(BIN)/python -m pip install --quiet --no-deps --target build/triton-$* triton==$*
# Triton 3.6's interpreter does not run with numpy 2.4.
build/triton-3.6.0/numpy: build/triton-3.6.0/triton
	$(BIN)/python -m pip install --quiet --no-deps --target build/triton-3.6.0 'numpy<2.4'

aot: $(TRITONS:%=build/triton-%/triton)  ## attention's kernels in 16 bits, compiled by other versions of Triton: spills, tiles, occupancy
	for version in $(TRITONS); do \
		PYTHONPATH=build/triton-$$version $(BIN)/python -m fusebert.bench.aot --heaviest --only 'attention bf16' \
			--arch $(ARCHS) --jobs 1 --out bench/results || failed=1; \
	done; exit $${failed:-0}

TRITON_CHECKED := tests/kernels/attn/test_short.py tests/kernels/attn/test_schedule.py
# ttsem does not read what Triton 3.6 compiles.
triton-versions: build/triton-3.6.0/numpy build/triton-3.9.0/triton $(VENV)/.gpu-check  ## short tests with the oldest and the newest Triton
	for version in 3.6.0 3.9.0; do \
		PYTHONPATH=build/triton-$$version OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q $(TRITON_CHECKED) || exit 1; \
		PYTHONPATH=build/triton-$$version $(BIN)/python -m fusebert.bench.aot --only 'layernorm H=' --jobs 1 || exit 1; \
	done
	PYTHONPATH=build/triton-3.9.0 $(GPU_CHECK) -q -m gpu_check_quick tests/kernels/attn/test_schedule.py tests/gpu/test_training_step.py

SOAK_MINUTES ?= 60
soak: $(VENV)/.dev  ## break tiny runs at random (kills, signals, full disks, flipped bits) for SOAK_MINUTES
	PYTHONPATH=tests/support OMP_NUM_THREADS=1 $(BIN)/python -W ignore tests/support/soak.py $(SOAK_MINUTES)

FUZZ_MINUTES ?= 60
fuzz: $(VENV)/.dev  ## every reader on random and damaged files for FUZZ_MINUTES
	$(BIN)/python tests/support/fuzz.py $(FUZZ_MINUTES)

bench: $(VENV)/.dev  ## every operator and the training step against reference and peers
	$(BIN)/fusebert bench kernels --minutes 5
	$(BIN)/fusebert bench step --minutes 5

# Run it on a quiet machine with everything committed: each file names the commit that it measured.
RESULT := bench/results/$(shell date +%F)-cpu
figures: $(VENV)/.dev data/pydocs/manifest.json  ## take the CPU figures anew (15 minutes) and write them into README.md
	for size in mini-1024 small-1024 base-512; do for lengths in equal ragged; do \
		$(BIN)/fusebert bench step --device cpu --model $${size%-*} --$$lengths --tokens $${size#*-} \
			--out $(RESULT)-step-$${size%-*}-$$lengths.json || exit 1; \
	done; done
	$(BIN)/fusebert pretrain --device cpu --data data/pydocs --out runs/figures-$(shell date +%F) --recipe fast --minutes 5
	$(BIN)/python -m fusebert.bench.record runs/figures-$(shell date +%F) --out $(RESULT)-pretrain.json
	$(BIN)/python -m fusebert.bench.readme

readme: $(VENV)/.dev  ## write the figures in README.md and docs/ from bench/results/
	$(BIN)/python -m fusebert.bench.readme

# mypy needs the folders under their import name.
lint: $(VENV)/.dev  ## style, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@mkdir -p build/typecheck/fusebert
	@for name in kernels model train bench; do ln -sfn ../../../$$name build/typecheck/fusebert/$$name; done
	cd build/typecheck && ../../$(BIN)/mypy --config-file ../../pyproject.toml -p fusebert

format: $(VENV)/.dev  ## rewrite the code in the project's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove what make built (not data/ or runs/)
	rm -rf $(VENV) build *.egg-info
