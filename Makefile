# make demo    set-up with what running needs, then the shipped world; the address is printed
# make setup   .venv with everything, development tools too
# make test    set-up, linter, types, every test but those of make test-ray
# make test-ray  the tests that start clusters of Ray and kill parts of them, some 10 minutes
# make bench   the timings, written to reports/
# make readme  the figures of README.md, docs/phases, the model card and the roadmap again, from the reports
#
# PYTHON=python3.12 picks an interpreter (3.10 to 3.12). TORCH_INDEX= (empty) takes PyPI's torch, which on Linux carries CUDA.

PYTHON ?= $(shell for p in python3 python3.12 python3.11 python3.10; do \
	$$p -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 13))' 2>/dev/null && echo $$p && break; done)
ifeq ($(shell uname -s),Linux)
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
endif
PORT ?= 8765

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
RUN_STAMP := $(VENV)/.worldline-run
DEV_STAMP := $(VENV)/.worldline-dev

.PHONY: demo setup test test-ray bench readme debian clean

demo: $(RUN_STAMP)
	$(BIN)/worldline play port=$(PORT)

setup: $(DEV_STAMP)

# Warnings are errors in pytest; ruff and mypy come first because they answer in seconds.
test: $(DEV_STAMP) debian
	$(BIN)/ruff check --no-cache .
	$(BIN)/ruff format --no-cache --check .
	$(BIN)/mypy
	find src/worldline/tinyengine -name '*pp' -exec $(BIN)/clang-format --dry-run --Werror {} +
	$(BIN)/clang-tidy --quiet $$(find src/worldline/tinyengine -name '*.cpp' ! -name startup.cpp) -- \
		-std=c++17 -fno-exceptions -fno-rtti -I src/worldline/tinyengine/firmware/host -DTINYENGINE_SCALAR
	$(BIN)/python -m pytest -n 2 -m "not ray" --junitxml=build/tests.xml

test-ray: $(DEV_STAMP)
	$(BIN)/python -m pytest -m ray --junitxml=build/tests-ray.xml

bench: $(DEV_STAMP)
	$(BIN)/worldline bench

readme: $(DEV_STAMP)
	$(BIN)/python scripts/readme
	$(BIN)/python scripts/phases
	$(BIN)/python scripts/model_card
	$(BIN)/python scripts/roadmap

debian:
	@scripts/system-packages $(BIN)/python

# The CPU build of torch has a higher local version (2.13.0+cpu), so pip takes it from the extra index or from a
# local wheel folder where there is one, and PyPI's build elsewhere.
$(VENV)/.torch: constraints.txt
	@[ -n "$(PYTHON)" ] || { echo "Python 3.10 to 3.12 is needed and was not found: apt-get install python3 python3-venv" >&2; exit 2; }
	@echo "setting up $(VENV) with $(PYTHON) (once, 1 to 4 minutes)"
	@[ -x $(BIN)/python ] || $(PYTHON) -m venv $(VENV) || { \
		echo "$(PYTHON) -m venv failed; on Debian: apt-get install python3-venv" >&2; rm -rf $(VENV); exit 2; }
	$(PIP) --no-deps --retries 1 $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) torch
	@touch $@

$(RUN_STAMP): $(VENV)/.torch pyproject.toml
	$(PIP) --editable '.[envs]'
	$(PIP) --no-deps vizdoom  # its pygame-ce would overwrite the pygame of gym-pusht
	@touch $@

$(DEV_STAMP): $(VENV)/.torch pyproject.toml
	$(PIP) --editable '.[envs,dev]'
	$(PIP) --no-deps vizdoom
	@touch $@ $(RUN_STAMP)

clean:
	rm -rf $(VENV) build dist src/*.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
