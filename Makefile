# make demo   sets up, trains on generated scenes, evaluates, draws
# make test   sets up, lints, runs every test
# make mini   Tables 1 and 3 in miniature, JOBS runs at once: docs/results/mini.md says what to expect
# ACCELERATOR=cuda or tpu installs that variant instead of the CPU's
ACCELERATOR ?= $(or $(patsubst .venv/.ready-%,%,$(firstword $(wildcard .venv/.ready-*))),cpu)
REQUIREMENTS := $(if $(filter cpu,$(ACCELERATOR)),requirements.txt,requirements-$(ACCELERATOR).txt)
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	command -v $$p >/dev/null && $$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null && echo $$p && break; done)
PY := .venv/bin/python
DEMO := runs/demo

.PHONY: demo test mini setup clean

demo: setup
	$(PY) scripts/train.py --config configs/demo.py --workdir $(DEMO)
	@echo "pictures: $(DEMO)/pictures"

test: setup
	$(PY) -m ruff check
	$(PY) -m ruff format --check
	$(PY) -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations 10

JOBS ?= $(shell nproc 2>/dev/null || echo 1)
SWEEP := $(PY) scripts/sweep.py --base configs/mini.py --workdir runs/mini --jobs $(JOBS)
SWEEPS := configs/sweeps
TABLES := $(addprefix $(SWEEPS)/,table1a.py table1b.py table1c.py table1d.py table1e.py table3.py)
CONTROLS := $(addprefix $(SWEEPS)/,section5_1.py rates.py balance.py long.py)
SEVERAL_SEEDS := gamma_0.0 gamma_1.0 gamma_2.0 focal_star_2.0_1.0 cross_entropy_box_x5 focal_box_x5

mini: setup
	$(PY) scripts/pretrain.py
	$(PY) scripts/pretrain.py --model.backbone resnet34 --model.backbone-weights data/mini/resnet34.safetensors --steps 2500
	$(SWEEP) --sweep $(TABLES) $(CONTROLS)
	$(SWEEP) --sweep $(addprefix $(SWEEPS)/,table1b.py table3.py balance.py) --seeds 0 1 2 --only $(SEVERAL_SEEDS)
	$(PY) scripts/report.py --workdir runs/mini

setup: .venv/.ready-$(ACCELERATOR)

.venv/.ready-$(ACCELERATOR): requirements.txt $(REQUIREMENTS) pyproject.toml
	@test -n "$(PYTHON)" || { echo "error: Python 3.11, 3.12 or 3.13 is needed; name it with make PYTHON=/path/to/python3" >&2; exit 1; }
	@echo "setting up .venv with $(REQUIREMENTS): a few minutes, once"
	@$(PYTHON) -m venv .venv
	@$(PY) -m pip install --quiet --disable-pip-version-check -r $(REQUIREMENTS)
	@$(PY) -m pip install --quiet --disable-pip-version-check --no-deps -e .
	@rm -f .venv/.ready-*
	@touch $@

clean:
	rm -rf .venv .cache runs/demo
