# Every target does all of its own set-up: it makes .venv, installs the pinned packages once, and runs.
# Needs python3 (3.10 to 3.13) and make; `make PYTHON=/path/to/python3.12 …` picks another Python.

PINS := tests/requirements.txt
VENV := .venv
READY := $(VENV)/ready
BIN := $(VENV)/bin
# Two processes, each with whole files, so that what a file shares is made once.
PYTEST = $(BIN)/python -m pytest --numprocesses 2 --dist loadfile

# Core ML tools have no build for Python 3.14 yet, and a Mac's own python3 may be 3.9.
FITS := import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python3.10; do \
	"$$p" -c '$(FITS)' 2>/dev/null && { echo "$$p"; exit; }; done)

# Swift 6, on PATH or where its archive is unpacked; nothing else here needs it.
SWIFT ?= $(shell for s in swift /opt/swift/usr/bin/swift; do \
	"$$s" --version 2>/dev/null | grep -Eq 'Swift version ([6-9]|[1-9][0-9])\.' && { echo "$$s"; exit; }; done)
NO_SWIFT := No Swift 6 toolchain, on PATH or in /opt/swift: the Swift tests are not run.
# Each package builds in a folder of its own: in one, Swift takes the plan of one for the other's.
SWIFT_TEST = $(SWIFT) test --package-path examples/$(1) --scratch-path $(CURDIR)/build/swift/$(1)$(2)
KIT := MedPhiKit
APP := MedPhiApp
# What the demo of the slow tests leaves here is read by the Swift tests.
KEPT := $(CURDIR)/build/demo

.PHONY: help demo test check lint types format swift-test swift-coverage
.PHONY: bench-export bench-full-size clean

help:
	@echo "make demo    the whole path on the embedded model and sample, offline"
	@echo "make test    the fast tests, and those of the Swift packages where there is Swift"
	@echo "make check   lint, types, fast and slow tests with coverage, Swift tests: what CI runs"
	@echo "make format  put the sources into the form that lint expects"
	@echo "make swift-test      the Swift tests alone; make swift-coverage adds what they reach"
	@echo "make bench-full-size  load, train and write with a 3.8 B model of random weights (24 GB)"
	@echo "make bench-export     export a 3.8 B model of random weights to Core ML (12 GB of disk)"
	@echo "make clean   remove .venv and caches"

demo: $(READY)
	$(BIN)/medphi demo

test: $(READY)
	$(PYTEST)
	@$(MAKE) --no-print-directory swift-test

check: lint types
	rm -rf $(KEPT)
	MEDPHI_DEMO_OUT=$(KEPT) $(PYTEST) --cov -m "not network and not macos and not gpu"
	@test -d $(KEPT)/notes.medphi
	@MEDPHI_DEMO_BUNDLE=$(KEPT)/notes.medphi MEDPHI_OPTIMISE=1 $(MAKE) --no-print-directory swift-coverage

swift-test:
ifeq ($(SWIFT),)
	@echo "$(NO_SWIFT)"
else
	$(call SWIFT_TEST,$(KIT))
	$(call SWIFT_TEST,$(APP))
endif

swift-coverage: $(READY)
ifeq ($(SWIFT),)
	@echo "$(NO_SWIFT)"
else
	$(call SWIFT_TEST,$(KIT),-coverage) --enable-code-coverage
	$(BIN)/python tests/swift_coverage.py build/swift/$(KIT)-coverage/debug/codecov/$(KIT).json examples/$(KIT)/Sources
	$(call SWIFT_TEST,$(APP))
endif

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Written last, so that an interrupted install is started again; --clear, so that only what is pinned is there.
$(READY): $(PINS) pyproject.toml
	@test -n "$(PYTHON)" || { echo "No Python 3.10 to 3.13 found; install one or give PYTHON=…" >&2; exit 2; }
	@echo "Installing the pinned packages into $(VENV), once; this takes a few minutes."
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $$(grep -E '^(pip|setuptools|wheel)==' $(PINS))
	$(BIN)/python -m pip install --quiet --no-build-isolation --requirement $(PINS)
	$(BIN)/python -m pip install --quiet --no-build-isolation --no-deps --editable .
	@touch $@

bench-full-size: $(READY)
	$(BIN)/python examples/bench_full_size.py

bench-export: $(READY)
	$(BIN)/python examples/bench_export.py

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .coverage build *.egg-info
