# For those who work on eectl. `make smoke` first; PYTHON names another interpreter.
PYTHON ?= $(if $(wildcard .venv/bin/python),.venv/bin/python,python3)
SMOKE   = build/smoke
EECTL   = $(PYTHON) -m eectl

.PHONY: smoke test fuzz faults lint format types docs
.DEFAULT_GOAL := smoke

smoke:  ## the chain that a user types, on digits, and the quickest tests
	rm -rf $(SMOKE)
	$(PYTHON) docs/hooks/digit_images.py $(SMOKE)/new
	$(EECTL) train digits --regime mixed --epochs 1 -q -o $(SMOKE)/digits
	$(EECTL) calibrate-thresholds $(SMOKE)/digits/model.safetensors
	$(EECTL) evaluate $(SMOKE)/digits/model.safetensors --policy $(SMOKE)/digits/policy.json
	$(EECTL) predict $(SMOKE)/digits/model.safetensors --policy $(SMOKE)/digits/policy.json --budget 50 $(SMOKE)/new
	$(PYTHON) -m pytest tests/test_layers.py tests/test_readme.py tests/recipe/test_regimes.py tests/exits/test_policy.py
	rm -rf $(SMOKE)

test:
	$(PYTHON) -m pytest -n auto

N    ?= 20000
SEED ?= 0
HOSTILE = PYTHONPATH=.:tests OMP_NUM_THREADS=1 $(PYTHON) -m hostile

fuzz:  ## N damaged files and options through every command; failures go to build/fuzz with the line that repeats each
	$(HOSTILE).fuzz -n $(N) --seed $(SEED)

faults:  ## kills and full disks at every moment of writing and at random, and commands that write to one place at once
	$(HOSTILE).faults --seed $(SEED)

lint:
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .

format:
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .

types:
	$(PYTHON) -m mypy

docs:  ## into site/; any warning, such as a link that leads nowhere, is an error
	NO_MKDOCS_2_WARNING=1 $(PYTHON) -m mkdocs build --strict --quiet
