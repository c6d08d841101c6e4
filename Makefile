# Two commands, each does all of its own set-up: `make demo` and `make test`. Everything lives in .venv, but for the few
# packages in .venv-verl: verl wants an older transformers than TRL brings, and is only called by tests/contracts.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt
PIP_VERL := .venv-verl/bin/pip install --quiet --disable-pip-version-check --constraint constraints-verl.txt
export HF_HUB_OFFLINE := 1
export OMP_WAIT_POLICY := PASSIVE
export TOKENIZERS_PARALLELISM := false

.PHONY: demo test lint clean

demo: .venv/ready
	$(BIN)/polarity compare --methods grpo,dapo,psr,nsr,a3po --steps 60 --evaluation.final_samples 16 --out runs/demo --overwrite

test: lint .venv-verl/ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2
	OMP_NUM_THREADS=1 .venv-verl/bin/python -m pytest tests/contracts

lint: .venv/ready-dev
	$(BIN)/ruff check src tests benchmarks
	$(BIN)/ruff format --check src tests benchmarks
	$(BIN)/mypy

# torch before everything else: what asks for it without a version would bring gigabytes of CUDA packages
.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(PIP) torch
	$(PIP) --editable .
	touch $@

.venv/ready-dev: .venv/ready
	$(PIP) --editable ".[dev]"
	touch $@

# verl without its engine: what `import verl.trainer.ppo.core_algos` needs, and no more
.venv-verl/ready: constraints-verl.txt
	$(PYTHON) -m venv .venv-verl
	$(PIP_VERL) torch
	$(PIP_VERL) codetiming numpy omegaconf packaging pydantic pytest pyyaml ray tensordict transformers
	$(PIP_VERL) --no-deps verl --editable .
	touch $@

clean:
	rm -rf .venv .venv-verl runs
