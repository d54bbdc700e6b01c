# Everything runs from .venv; `make setup` creates it and .venv-rollout (SGLang).
.PHONY: setup quickstart test slurm sweep lint clean
.DEFAULT_GOAL := test

setup:
	@tools/setup.sh

quickstart: setup
	.venv/bin/matpo train recipes/quickstart.yaml

# Two workers, because real runs wait for each other's processes as much as they compute. A file stays
# together: its tests share servers.
test: lint
	.venv/bin/python -m pytest -m "not gpu and not sweep and not slurm" \
		-n 2 --dist loadfile --no-loadscope-reorder

# Jobs on a real Slurm of two nodes on this machine: as root, with Debian's slurm-wlm and munge.
slurm: setup
	.venv/bin/python -m pytest -m slurm

# Every layout against the float64 oracle and of every family, 20 killed saves: `make test` has a part.
sweep: setup
	.venv/bin/python -m pytest -m sweep

lint: setup
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/pyright

clean:
	rm -rf .venv .venv-rollout *.egg-info build dist .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
