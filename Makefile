# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RECIPE ?= recipes/points-tiny.yaml

.PHONY: demo test lint types unit install compile images test-images test-cluster clean

demo: install  ## the whole POINTS recipe at laptop size, ending in report.html
	$(BIN)/vlmflow demo $(RECIPE)

test: lint types unit  ## everything CI runs

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install
	$(BIN)/mypy

unit: install
	$(BIN)/python -m pytest -n 2 --dist loadfile

compile: install  ## rewrite the committed compiled pipelines
	$(BIN)/vlmflow compile

images:  ## all four container images by buildah; settings: images/build.sh
	images/build.sh

test-images:  ## builds the images for CPUs and runs the tiny recipe in them; settings: images/test.sh
	images/test.sh

test-cluster: install  ## the chart and the launcher on a real Kubernetes API; KUBEBUILDER_ASSETS: docs/cluster.md
	$(BIN)/python -m pytest tests/cluster

install: $(VENV)/.ready

$(VENV)/.ready: requirements/build.txt requirements/cpu.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and f"vlmflow needs Python 3.11 or newer, {sys.version.split()[0]} found; set PYTHON=")'
	$(PYTHON) -m venv $(VENV)
	@echo "installing the locked environment into $(VENV) (about 2.5 GB on disk, a few minutes)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements/build.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation -r requirements/cpu.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps --editable .
	@touch $@

clean:
	rm -rf $(VENV) .vlmflow .pytest_cache .mypy_cache .ruff_cache build *.egg-info
