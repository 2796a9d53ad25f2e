# make demo: set up and run the main job on its embedded default.   make test: set up and run every test.
# On a GPU machine: make demo ACCELERATOR=gpu
PYTHON ?= python3
ACCELERATOR ?= cpu
ROOT ?= runs

.PHONY: demo test check

demo: .venv/installed-$(ACCELERATOR)
	.venv/bin/strata run demo --root $(ROOT)

test: .venv/installed-$(ACCELERATOR)
	.venv/bin/python -m pytest

check: .venv/installed-$(ACCELERATOR)
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/lint-imports
	.venv/bin/mypy

.venv/installed-$(ACCELERATOR): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), f"Strata needs Python 3.11 or newer; PYTHON={sys.executable} is {sys.version.split()[0]}"'
	test -x .venv/bin/python || $(PYTHON) -m venv .venv
	.venv/bin/pip install -q -c constraints.txt -e '.[$(ACCELERATOR),demo,test]'
	touch $@
