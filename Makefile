# make demo, make test: the two set-up commands. Both need only Python 3.11+, git and make.
PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2
PYTEST_ARGS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
INSTALL := $(PIP) install --quiet --constraint constraints.txt --editable
NEEDS_PYTHON := import sys; v = sys.version_info[:2]; sys.exit(None if v >= (3, 11) else \
	f"{sys.executable} is Python {v[0]}.{v[1]}. hf_opentrans needs Python 3.11 or newer.")

.PHONY: help demo test test-deploy results lint types format clean
.DELETE_ON_ERROR:

help:
	@echo "make demo    install into $(VENV), prune and segment, write demo-output/"
	@echo "make test    install the test extra into $(VENV), run all tests but those of make test-deploy"
	@echo "make test-deploy  install the runtimes and the demo too, run their tests"
	@echo "make results measure the published figures (hours; goes on where it stopped)"
	@echo "make lint    ruff check and ruff format --check"
	@echo "make types   pyright"
	@echo "make format  let ruff rewrite what it can"
	@echo "make clean   remove $(VENV), demo-output and caches"

demo: $(VENV)/.demo
	$(BIN)/hf-opentrans demo --output demo-output

# The figures that README and cards show; nothing else should run meanwhile. The long ones are moved to their
# place when all are done: interrupted, `make results` goes on where it stopped.
SCENES := .results-scenes
MEASURED := --model clip-scenes --images calibration --fidelity-images test --segmentation test --classification single
RUNTIMES := --runtimes eager compile onnxruntime openvino --precision fp32 bf16 int8
results: $(VENV)/.deploy-test
	$(BIN)/hf-opentrans scenes --output $(SCENES)/calibration --count 512 --seed 1
	$(BIN)/hf-opentrans scenes --output $(SCENES)/test --count 100 --names 40 --seed 2
	$(BIN)/hf-opentrans scenes --output $(SCENES)/single --single --names 100 --count 4 --seed 3
	cd $(SCENES) && ../$(BIN)/hf-opentrans benchmark pruning $(MEASURED) --keep 0.7 0.57 0.5 --seeds 3 \
		--json pruning-clip-scenes.json
	cd $(SCENES) && ../$(BIN)/hf-opentrans benchmark pruning $(MEASURED) --keep 0.57 --seeds 3 --ablation \
		--json ablation-clip-scenes.json
	$(BIN)/hf-opentrans benchmark scale --json $(SCENES)/pruning-scale.json
	$(BIN)/hf-opentrans scenes --output $(SCENES)/scenes --count 400 --val 100 --names 40 --seed 2
	cd $(SCENES) && ../$(BIN)/hf-opentrans benchmark layer-selection --model clip-scenes --dataset scenes \
		--resolution 80 --json layer-selection-clip-scenes.json
	cd $(SCENES) && ../$(BIN)/hf-opentrans benchmark recovery --model clip-scenes --images calibration \
		--json recovery-clip-scenes.json
	cd $(SCENES) && ../$(BIN)/hf-opentrans benchmark transfer --model clip-scenes --dataset scenes \
		--images calibration --resolution 80 --steps 200 --json transfer-clip-scenes.json
	cd $(SCENES) && ../$(BIN)/hf-opentrans benchmark elastic --model clip-scenes --images calibration \
		--fidelity-images test --segmentation test --json elastic-clip-scenes.json
	cd $(SCENES) && ../$(BIN)/hf-opentrans prune clip-scenes --images calibration --keep 0.7 --output clip-scenes-keep-0.7
	cd $(SCENES) && ../$(BIN)/hf-opentrans benchmark semi-structured --models clip-scenes clip-scenes-keep-0.7 \
		--images calibration --segmentation test --json semi-structured-clip-scenes.json
	cd $(SCENES) && ../$(BIN)/hf-opentrans benchmark latency --models clip-scenes clip-scenes-keep-0.7 $(RUNTIMES) \
		--batch 1 --images calibration --segmentation test --json precisions-clip-scenes.json
	mv $(SCENES)/elastic-*.* $(SCENES)/semi-*.* $(SCENES)/precisions-*.* $(SCENES)/pruning-*.* $(SCENES)/ablation-clip-scenes.* $(SCENES)/layer-selection-*.* \
		$(SCENES)/recovery-*.* $(SCENES)/transfer-*.* model_cards/results/
	$(BIN)/hf-opentrans benchmark spectra --json model_cards/results/spectra-vit.json
	$(BIN)/hf-opentrans benchmark cold-start --json model_cards/results/cold-start.json
	$(BIN)/hf-opentrans benchmark metric --rounds 9 --json model_cards/results/metric.json
	$(BIN)/hf-opentrans benchmark cuts --repeats 7 --threads 1 --json model_cards/results/cuts.json
	$(BIN)/hf-opentrans benchmark latency --json model_cards/results/latency-vit-b16.json
	$(BIN)/hf-opentrans benchmark latency $(RUNTIMES) --keep 0.65 0.5 --rounds 7 --batch 1 8 --resolution 224 \
		--json model_cards/results/runtimes-vit-b16.json
	$(BIN)/hf-opentrans benchmark latency $(RUNTIMES) --keep 0.65 0.5 --rounds 7 --batch 1 --resolution 512 \
		--json model_cards/results/runtimes-vit-b16-512.json
	$(BIN)/hf-opentrans benchmark tables README.md model_cards/*.md

# The runtimes and the demo have a run of their own: they are large, and `make test` must be quick.
DEPLOY_TESTS := tests/deploy tests/app tests/test_cli_app.py tests/test_benchmark_runtimes.py
# One thread per worker: two workers then fill two cores without fighting over them. Stealing keeps the tests of a file
# together, which share what is slow to make.
test: $(VENV)/.test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(addprefix --ignore=,$(DEPLOY_TESTS)) $(PYTEST_ARGS)

test-deploy: $(VENV)/.deploy-test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(DEPLOY_TESTS) $(PYTEST_ARGS)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Pyright reads the installed packages, so it needs what all tests need.
types: $(VENV)/.deploy-test $(VENV)/.dev
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) demo-output build dist .pytest_cache .ruff_cache .hypothesis
	find hf_opentrans tests -type d -name __pycache__ -prune -exec rm -rf {} +

$(VENV)/.python:
	@command -v $(PYTHON) >/dev/null || { echo "There is no $(PYTHON) here. hf_opentrans needs\
	 Python 3.11 or newer. Install it or name one: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c '$(NEEDS_PYTHON)' || { echo "Name a newer one: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { echo "$(PYTHON) could not create $(VENV). On Debian and Ubuntu\
	 install the package python3-venv, then run make again." >&2; exit 1; }
	@$(BIN)/python -c '$(NEEDS_PYTHON)' || { echo "Remove $(VENV) and run make again." >&2; exit 1; }
	@touch $@

# Stamps: an extra is installed again only when its inputs change.
$(VENV)/.demo $(VENV)/.test $(VENV)/.deploy-test $(VENV)/.dev: $(VENV)/.%: $(VENV)/.python pyproject.toml constraints.txt
	@echo "Installing hf_opentrans[$*] into $(VENV) (the first time takes some minutes)"
	@$(INSTALL) ".[$*]"
	@touch $@
