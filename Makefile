# `make quickstart` runs the main job from nothing, `make test` passes the tests; each sets itself up in .venv.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
# bf16 where the CPU has units for it, else fp32: the same job in fewer minutes.
DATA_TYPE := $(shell grep -qsE "avx512_bf16|amx_bf16" /proc/cpuinfo && echo bf16 || echo fp32)
LAUNCH := $(BIN)/accelerate launch --quiet --config_file configs/accelerate/cpu.yaml
RUN := runs/quickstart

.PHONY: quickstart test test-slow lint docs docs-check clean

quickstart: .venv/main.stamp
	rm -rf $(RUN)
	$(LAUNCH) trainer.py --config configs/tiny.yaml --data_type $(DATA_TYPE) --latent_loss_weight 0 --output_dir $(RUN)
	$(LAUNCH) val_inference.py --config configs/tiny.yaml --data_type $(DATA_TYPE) --output_dir $(RUN) --load_checkpoint best
	@echo
	@echo "Predicted masks lie in $(RUN)/mask_predictions, curves in $(RUN)/history.csv, checkpoints in $(RUN)/checkpoints."
	@echo "Next, with a GPU, Trans10k in data/Trans10k and a login for SD3.5 medium (hf auth login):"
	@echo "  $(BIN)/accelerate launch --config_file configs/accelerate/gpu.yaml trainer.py"
	@echo "  $(BIN)/accelerate launch --config_file configs/accelerate/gpu.yaml val_inference.py"

test: .venv/dev.stamp lint
	$(BIN)/python -m pytest

test-slow: .venv/slow.stamp
	$(BIN)/python -m pytest -m slow

lint: .venv/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Every command of README.md and docs/ in a fresh clone and a new environment: an hour and more.
docs-check:
	$(PYTHON) docs/check_commands.py

docs: .venv/dev.stamp
	$(BIN)/python -m pdoc --docformat google --output-directory docs/api trainer val_inference predict demo dataset models utils

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || \
		{ echo "error: $(PYTHON) is not Python 3.11, 3.12 or 3.13; name one with: make PYTHON=python3.12 ..." >&2; exit 2; }
	$(PYTHON) -m venv .venv || { rm -rf .venv; exit 2; }

.venv/main.stamp: requirements.txt | .venv/bin/python
	$(PIP) -r requirements.txt
	touch $@

.venv/dev.stamp: .venv/main.stamp requirements-dev.txt requirements-render.txt requirements-trackers.txt requirements-video.txt requirements-demo.txt
	$(PIP) -r requirements-dev.txt -r requirements-render.txt -r requirements-trackers.txt -r requirements-video.txt -r requirements-demo.txt
	touch $@

.venv/slow.stamp: .venv/dev.stamp requirements-deepspeed.txt requirements-memory.txt
	$(PIP) -r requirements-deepspeed.txt -r requirements-memory.txt
	touch $@
