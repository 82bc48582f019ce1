# Needs nothing but Python 3.11 or newer and make. Everything else goes into .venv, or comes from Debian when it may.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
# The newest versions that work together on every supported Python, with the hashes of their files and no index's address.
LOCK := $(BIN)/uv pip compile --quiet --upgrade --universal --python-version 3.11 --generate-hashes --no-header --no-annotate --no-emit-index-url pyproject.toml --extra build
# Tests mostly wait: for processes, deadlines and disks.
WORKERS := 4
STAMP := $(VENV)/.installed
STAMP_DEV := $(VENV)/.installed-dev
STAMP_BENCH := $(VENV)/.installed-bench

.DEFAULT_GOAL := help
.PHONY: help run test check lint lock format demo bench torture clean

help: ## Show what there is to make
	@grep -E '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

run: $(STAMP) ## Set everything up and serve on http://127.0.0.1:8080/notify
	@exec $(BIN)/python -m notify_server

demo: $(STAMP) ## Play the platform against a daemon of its own, and show what it found
	@exec $(BIN)/python -m notify_server simulate --own-daemon

test: $(STAMP_DEV) lint ## Set everything up and run the tests
	@$(PYTHON) tests/debian.py strace sqlite3 openssl iproute2 chromium prometheus postgresql pgbouncer nginx caddy systemd
	@$(BIN)/pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

lint: $(STAMP_DEV) ## Check format, style and types
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-cache >/dev/null || $(BIN)/lint-imports --no-cache
	@$(BIN)/deptry . >/dev/null 2>&1 || $(BIN)/deptry .
	@$(BIN)/codespell

check: lint ## Check style, logic, pages and the store on SQLite, within two minutes
	@$(BIN)/pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder tests/unit tests/web tests/store -m "not postgres" -k "not postgres"

lock: $(STAMP_DEV) ## Renew the lock files that everything is installed from
	@$(PIP) uv
	@$(LOCK) -o requirements.lock
	@$(LOCK) --extra dev -c requirements.lock -o requirements-dev.lock

format: $(STAMP_DEV) ## Format the code
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

bench: $(STAMP_DEV) ## Measure it beside others for half an hour; PARTS="acks latency probes together growth …", QUICK=1, JSON=, PLOTS=
	@$(MAKE) --no-print-directory $(STAMP_BENCH) || echo "the tables name the missing programs" >&2
	@$(PYTHON) tests/debian.py nginx wrk
	@$(PYTHON) tests/debian.py curl webhook || echo "the tables name the missing programs" >&2
	@$(BIN)/python -m tests.bench $(PARTS) $(if $(QUICK),--quick) $(if $(JSON),--json $(JSON)) $(if $(PLOTS),--plots $(PLOTS))

torture: $(STAMP_DEV) ## Kill, stop, soak and deceive it for 20 minutes; PARTS="crash fsync stop soak …", SCALE=0.1, SEED=1
	@$(PYTHON) tests/debian.py strace nginx postgresql
	@$(BIN)/python -m tests.torture $(PARTS) $(if $(SCALE),--scale $(SCALE)) $(if $(SEED),--seed $(SEED)) $(if $(JSON),--json $(JSON))

clean: ## Remove what was installed and built; the record in data/ stays
	rm -rf $(VENV) *.egg-info build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis

$(STAMP): pyproject.toml requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, this is " + sys.version.split()[0] + ": make PYTHON=python3.11 …")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "Python cannot make virtual environments here: apt-get install python3-venv" >&2; exit 1; }
	@$(PIP) --require-hashes -r requirements.lock
	@$(PIP) --no-deps --no-build-isolation -e .
	@touch $@

$(STAMP_DEV): $(STAMP) requirements-dev.lock
	@$(PIP) --require-hashes -r requirements-dev.lock
	@touch $@

$(STAMP_BENCH): $(STAMP_DEV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[bench]'
	@touch $@
