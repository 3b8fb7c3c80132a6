# make setup   .venv with all that is needed      make test   the test suite
# make demo    train and compare on the sample    make lint   style

PYTHON ?= $(shell command -v python3.11 || command -v python3)
PIP = .venv/bin/python -m pip

.PHONY: setup demo test lint

setup: .venv/installed

# The stamp is written last, so that an interrupted installation is repeated.
.venv/installed: requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed")'
	$(PIP) --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv
	$(PIP) install --disable-pip-version-check -r requirements.txt
	$(PIP) install --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $@

demo: setup
	@echo "Six short trainings on the bundled sample, and simple predictors beside them: about 1 minute on 2 free cores. Ctrl-C stops; the same command goes on."
	.venv/bin/python compare.py --demo

test: setup
	.venv/bin/python -m pytest -n 2 --dist loadfile $(PYTEST_ARGS)

lint: setup
	.venv/bin/python -m ruff check
	.venv/bin/python -m ruff format --check
