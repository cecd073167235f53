PYTHON ?= python3.11
BIN := .venv/bin

.PHONY: demo test test-all lint clean

demo: .venv/installed
	$(BIN)/danceopd train --config configs/demo.yaml
	$(BIN)/danceopd report runs/demo

test: .venv/installed-test
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 8

test-all: .venv/installed-test  # and what takes minutes
	$(BIN)/python -m pytest -m ""

lint: .venv/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/installed: .venv/bin/python setup.py constraints.txt $(wildcard csrc/*)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	touch $@

.venv/installed-test: .venv/installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $@

clean:
	rm -rf .venv runs build *.egg-info
