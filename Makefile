# make demo       from nothing to a streaming recogniser of spoken digits: under a quarter of an hour after the installation
# make test       everything that runs without a GPU; make test-slow adds what takes minutes
# make lint       style;  make types       types
#
# The environment is made in .venv by the first of them, and made again when pyproject.toml changes.

.PHONY: demo test test-slow lint types
.DEFAULT_GOAL := test

PYTHON := .venv/bin/python
SPEECHKIT := .venv/bin/speechkit
READY := .venv/.ready

demo: $(READY)
	$(SPEECHKIT) prepare digits
	$(SPEECHKIT) train recipes/digits/conf/demo.yaml
	$(SPEECHKIT) evaluate runs/demo --chunk-ms 320 640
	$(SPEECHKIT) stream runs/demo "$$(ls -S data/digits/audio/test/*.flac | head -n 1)" --realtime

test: lint types
	$(PYTHON) -m pytest -q -n 2 --dist loadfile -m "not slow and not gpu"

test-slow: $(READY)
	$(PYTHON) -m pytest -q -m "slow and not gpu"

lint: $(READY)
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .

types: $(READY)
	$(PYTHON) -m mypy

$(READY): pyproject.toml
	@set -e; \
	for candidate in python3.11 python3.12 python3.13 python3 python; do \
		if $$candidate -c 'import sys, ensurepip, venv; assert sys.version_info >= (3, 11)' 2>/dev/null; then \
			python=$$candidate; break; \
		fi; \
	done; \
	if [ -z "$$python" ]; then \
		echo "speechkit needs Python 3.11 or newer with its venv module, but none is on the PATH: install one, then make again." >&2; \
		exit 1; \
	fi; \
	test -x $(PYTHON) || $$python -m venv .venv
	$(PYTHON) -m pip install --quiet --editable '.[dev]'
	@touch $@
