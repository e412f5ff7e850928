# make sweep: run the main job. make test: run the tests. Both set up .venv first; all else is for developers.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RAY_TESTS := $(wildcard tests/test_ray*.py)
GPU_TESTS := tests/test_gpu.py
DOCKER_TESTS := $(wildcard tests/test_docker*.py)
SLURM_TESTS := $(wildcard tests/test_slurm*.py) tests/faults/test_slurm_coordinators.py

.PHONY: sweep test slurm ray docker gpu lint format bench faults clean

sweep: $(VENV)/.ready
	$(BIN)/repro-sweep +sweep=optimizer_grid

# Those of clusters and containers come at the end, each kind by itself: their daemons have deadlines of their own.
test: $(VENV)/.ready
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(patsubst %,--ignore=%,$(SLURM_TESTS) $(RAY_TESTS) $(DOCKER_TESTS) $(GPU_TESTS))
	$(MAKE) slurm
	$(MAKE) ray
	$(MAKE) docker

# Sweeps on a real SLURM cluster, which is started for them. On a busy machine its daemons miss their own deadlines now
# and then: a test that fails is run once more, and shown as rerun (tests/conftest.py).
slurm: $(VENV)/.ready
	$(BIN)/python -m pytest -n 2 --dist loadfile -rfEsR $(SLURM_TESTS)

# The same on a real Ray cluster.
ray: $(VENV)/.ready
	$(BIN)/python -m pytest -n 2 --dist loadfile -rfEsR $(RAY_TESTS)

# The images, and sweeps in their containers, on a Docker engine that is started for them, by root.
docker: $(VENV)/.ready
	$(BIN)/python -m pytest -rfEsR $(DOCKER_TESTS)

# Trials on a real GPU. Not part of `make test`, as most machines have none; it fails where there is none.
gpu: $(VENV)/.ready
	$(BIN)/python -m pytest $(GPU_TESTS)

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	PYTHONPATH=launcher $(BIN)/lint-imports

format: $(VENV)/.ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.ready
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[bench]'
	$(BIN)/python -m benchmarks --only launching --output docs/benchmarks.md
	$(BIN)/python -m benchmarks --only search --output docs/benchmarks-search.md
	$(BIN)/python -m benchmarks --only slurm --output docs/benchmarks-slurm.md
	$(BIN)/python -m benchmarks --only ray --output docs/benchmarks-ray.md
	$(BIN)/python -m benchmarks --only provenance --output docs/benchmarks-provenance.md
	$(BIN)/python -m benchmarks --only coordinator --output docs/benchmarks-coordinator.md
	$(BIN)/python -m benchmarks --only server --output docs/benchmarks-server.md

faults: $(VENV)/.ready
	$(BIN)/python -m pytest tests/faults --long --figures docs/reliability.md

clean:
	rm -rf $(VENV) multirun mlflow.db mlartifacts outputs

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,torch]'
	touch $@
