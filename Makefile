# `make demo` and `make test` set up .venv once and need nothing but Python 3.11 or newer, gcc and PyPI.
PYTHON ?= python3
VENV   := .venv
READY  := $(VENV)/.ready
OUT    ?= runs/demo-$(shell date +%Y%m%d-%H%M%S)

.PHONY: demo test lint bench clean

demo: $(READY)
	$(VENV)/bin/flashtrain train demo --out $(OUT)

test: $(READY)
	$(VENV)/bin/python -m pytest

lint: $(READY)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

bench: $(READY)
	$(VENV)/bin/python benchmarks/overlap.py --device cpu

$(READY): setup.py pyproject.toml constraints.txt CMakeLists.txt $(wildcard csrc/*.cpp csrc/*.hpp)
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	FLASHTRAIN_REQUIRE_EXT=1 $(VENV)/bin/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	touch $@

clean:
	rm -rf build *.egg-info flashtrain/*.so
