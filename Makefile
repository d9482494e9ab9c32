PYTHON ?= python3.11
BIN := .venv/bin
DEMO := build/demo

.PHONY: demo test lint

.venv/ready: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --editable '.[dev]'
	touch $@

demo: .venv/ready
	$(BIN)/edgeforge doctor
	$(BIN)/edgeforge export digits --target snapdragon-8-gen-3 --calibration embedded --out $(DEMO)/digits
	$(BIN)/edgeforge validate $(DEMO)/digits --data embedded --model digits
	@echo "report: $(DEMO)/digits/report.md"

test: .venv/ready
	$(BIN)/python -m pytest -n auto

lint: .venv/ready
	$(BIN)/ruff check edgeforge tests models
	$(BIN)/ruff format --check edgeforge tests models
