# Two commands: `make demo` shows it, `make test` proves it. `make help` lists the rest.

VENV ?= .venv
PY := $(VENV)/bin/python
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help setup demo dev test check format cover clean

help:  ## this list
	@grep -E '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /make \1\t/' | expand -t 14

setup:  ## .venv with what the demo needs; quick when nothing has changed
	@sh tools/setup demo $(VENV)

demo: setup  ## talk to the avatar in your browser; Ctrl-C ends it
	@exec $(VENV)/bin/voipavatar demo $(ARGS)

dev:  ## .venv with what the tests and checks need too
	@sh tools/setup demo,dev $(VENV)

test: dev  ## all tests, on real servers and a real browser; ARGS="-k stage" runs some
	@sh tools/need chromium:chromium,fonts-liberation ffmpeg:ffmpeg \
		rabbitmq-server:rabbitmq-server redis-server:redis-server
	$(PY) -m pytest $(ARGS)

check: dev  ## style and types
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

format: dev  ## put the code into the form that check wants
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

cover: dev  ## which lines the tests run: htmlcov/index.html
	$(PY) -m pytest --cov=voipavatar --cov-report=term:skip-covered --cov-report=html $(ARGS)

clean:  ## remove what make has made; what is in the cache folder stays
	rm -rf $(VENV) build dist htmlcov .coverage artifacts
	rm -rf .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -prune -exec rm -rf {} +
