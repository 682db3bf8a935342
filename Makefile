# Every target first makes .venv and installs the pinned packages, unless that is done: nothing needs to be set up by hand.
.DEFAULT_GOAL := help
.PHONY: help demo test test-slow gpu check setup
run := .venv/bin/python

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' Makefile | expand -t 20

demo: setup ## fetch the pocket model's parts, train and score one cell, print where its page is
	@$(run) -m mvlm.pocket.parts
	$(run) train.py projector=ldpv2 data=v2 strategy=unfreeze_llm
	@page=$$(ls -t runs/*/index.html 2>/dev/null | head -n 1); echo "the page of this run: $${page:-none was written}"

test: setup ## the fast tests, on a CPU
	@$(run) -m pytest -q -n 2 --dist loadfile

test-slow: setup ## the tests that train
	@$(run) -m pytest -q -m slow

gpu: setup ## the tests that need a GPU, then the benches at 1.7b dimensions (80 GB)
	@$(run) -c "import sys, torch; torch.cuda.is_available() or sys.exit('make gpu: there is no GPU here')"
	@$(run) -m pytest -q -m gpu
	$(run) bench.py target=train model=1.7b projector=pw2 micro_batch=32
	$(run) bench.py target=train model=1.7b projector=ldpv2 micro_batch=32
	$(run) bench.py target=decode model=1.7b

check: setup ## style, then the fast tests
	@$(run) -m ruff check
	@$(run) -m ruff format --check
	@$(run) -m pytest -q -n 2 --dist loadfile

setup: ## only the environment
	@./setup.sh
