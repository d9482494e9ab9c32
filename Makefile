PYTHON ?= python3.11
BIN := .venv/bin
DEMO := build/demo
CHROMIUM := $(firstword $(shell which chromium chromium-browser google-chrome 2>/dev/null))

.PHONY: demo test browser lint

.venv/ready: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --editable '.[dev]'
	touch $@

demo: .venv/ready
	$(BIN)/edgeforge doctor
	$(BIN)/edgeforge export digits --target snapdragon-8-gen-3 --calibration embedded --out $(DEMO)/digits
	$(BIN)/edgeforge validate $(DEMO)/digits --data embedded --model digits
	$(BIN)/edgeforge export tinylm --target snapdragon-8-gen-3 --calibration embedded --out $(DEMO)/tinylm
	$(BIN)/edgeforge validate $(DEMO)/tinylm
	$(BIN)/edgeforge generate $(DEMO)/tinylm --prompt "Once upon a time" --max-tokens 40
	EDGEFORGE_RESULTS=$(DEMO)/results.sqlite $(BIN)/edgeforge bench $(DEMO)/digits
	$(BIN)/edgeforge report $(DEMO)/digits $(DEMO)/tinylm --compare --no-run --out $(DEMO)/report.html

test: .venv/ready browser
	$(BIN)/python -m pytest -n auto

# The report's tests open it in Chromium: one that is here, else Debian's (as root), else Playwright's; without one they skip.
browser: .venv/ready
ifeq ($(CHROMIUM),)
	{ test "$$(id -u)" = 0 && timeout 60 apt-get update -qq \
	  && timeout 240 apt-get install -qq --no-install-recommends chromium fonts-dejavu-core; } \
	  || $(BIN)/playwright install chromium || echo "no Chromium: the tests of reports in a browser will skip"
endif

lint: .venv/ready
	$(BIN)/ruff check edgeforge tests models benchmarks targets
	$(BIN)/ruff format --check edgeforge tests models benchmarks targets
