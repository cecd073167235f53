PYTHON ?= python3.11
BIN := .venv/bin

.PHONY: demo journey test test-all torture lint docs site bench bench-gpu clean

demo: .venv/installed
	$(BIN)/danceopd train --config configs/demo.yaml
	$(BIN)/danceopd report runs/demo

journey: .venv/installed-test  # the whole way on the miniature: data, training, export, a plain pipeline, scores
	$(BIN)/python examples/journey.py

test: .venv/installed-test
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 8

test-all: test  # and then what takes minutes, one after the other: most of it runs several processes
	$(BIN)/python -m pytest -m slow

# 10,000 damaged files, runs that are killed and go on, and more rows, steps and pictures than anybody has: under 40 minutes.
torture: .venv/installed-test
	$(BIN)/python tests/torture --write
	$(BIN)/python -m pytest -m "slow or not slow" tests/training/zero/test_zero.py -k "kill or hangs or disk or signal or dies"

lint: .venv/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright --pythonpath $(BIN)/python

docs: .venv/installed-test  # what is made from the code: a test says where it is not up to date
	$(BIN)/python docs/make_api.py
	$(BIN)/python docs/make_models.py
	$(BIN)/python docs/make_memory.py
	$(BIN)/python docs/make_reference.py
	$(BIN)/python docs/make_notebook.py

site: docs  # the pages of docs as a site in runs/site
	$(BIN)/python -m pip install --quiet --editable '.[docs]'
	$(BIN)/mkdocs build

bench: .venv/installed-test  # at small sizes, on whatever is there
	$(BIN)/python -m benchmarks.run --suite quick --output bench-results

# The check of benchmarks/card with much time, which builds csrc's CUDA part and runs the tests marked gpu, then all
# benchmarks, what SD3.5-medium's size takes against the roofline, and one file to send. What fails is in the folder too,
# and the rest goes on.
bench-gpu: .venv/installed-test
	@$(BIN)/python -c "import sys, torch; from danceopd.support.devices import no_cuda; \
	torch.cuda.is_available() or sys.exit('make bench-gpu needs an NVIDIA GPU, and torch ' + torch.__version__ + ' finds \
	none (' + (no_cuda() or 'nvidia-smi says whether there is one') + '); make bench runs on a CPU')"
	rm -rf bench-results && mkdir bench-results
	-nvidia-smi > bench-results/nvidia-smi.txt
	-$(BIN)/python -m benchmarks.card --budget 1800 --out bench-results/card
	-$(BIN)/python -m benchmarks.run --suite all --output bench-results
	-$(BIN)/python -m benchmarks.query_bench --full --model sd35-medium --teachers 4 --rank 128 $(call to,query-sd35)
	-$(BIN)/python -m benchmarks.rollout_bench --full --model sd35-medium --batch 1 4 --guidance 1 4.5 $(call to,rollout-sd35)
	-$(BIN)/python -m benchmarks.roofline --batch 1 4 --results bench-results $(call to,roofline)
	tar -czf bench-results.tar.gz bench-results
	@echo "please send bench-results.tar.gz"

to = --json bench-results/$(1).json --plot bench-results/$(1).png | tee bench-results/$(1).txt

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/installed: .venv/bin/python setup.py constraints.txt $(wildcard csrc/*)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	touch $@

.venv/installed-test: .venv/installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $@

clean:
	rm -rf .venv runs build bench-results bench-results.tar.gz *.egg-info
