# make setup   .venv with all that is needed      make test   the test suite
# make demo    train and compare on the sample    make lint   style

PYTHON ?= $(shell command -v python3.11 || command -v python3)

.PHONY: setup demo test lint

setup: .venv/installed

# The stamp is written last, so that an interrupted installation is repeated.
.venv/installed: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed")'
	.venv/bin/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv
	.venv/bin/python -m pip install --disable-pip-version-check -r requirements.txt
	touch $@

demo: setup
	.venv/bin/python compare.py --demo

test: setup
	.venv/bin/python -m pytest -n 2 --dist loadfile $(PYTEST_ARGS)

lint: setup
	.venv/bin/python -m ruff check
	.venv/bin/python -m ruff format --check
