# `make help` lists the targets. Everything runs from the environment in .venv, which the first
# target to need it creates. One stamp file says that it is complete: it is removed before an
# installation starts and written after the installation has ended, so a killed one starts afresh.

PYTHON ?= python3
VENV := .venv
STAMP := $(VENV)/.installed
BIN := $(VENV)/bin
RUN := $(BIN)/python

export PYRIGHT_PYTHON_IGNORE_WARNINGS := 1
export NO_MKDOCS_2_WARNING := 1

.DEFAULT_GOAL := help
.PHONY: help setup demo zoo scoreboard faults kills test fuzz coverage mutants lint fmt bench peers tutorials docs serve check clean

help:  ## List the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP)  ## Create or update the environment in .venv

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "bilevel needs Python 3.11 or newer; name one with: make PYTHON=python3.11"; exit 1; }
	@echo "Installing into $(VENV): about a minute, longer where torch has to be downloaded"
	@if [ -f $@ ]; then rm $@; else $(PYTHON) -m venv --clear $(VENV); fi
	@$(RUN) -m pip install --disable-pip-version-check -q -c constraints.txt -e '.[dev,docs,example,onnx,test]'
	@touch $@

demo: $(STAMP)  ## Train EchoIR with ASBLO on photographs (about 10 minutes on 2 cores)
	$(RUN) examples/echoir/train.py

zoo: $(STAMP)  ## Solve the test problems, print the table, write docs/zoo.md
	$(RUN) benchmarks/zoo.py

PROBLEMS ?= $(firstword $(wildcard problems */problems ../*/problems))
scoreboard: $(STAMP)  ## Solve a folder of published problems (PROBLEMS=...), write docs/scoreboard.md
	@test -n "$(PROBLEMS)" || { echo "Name the folder of the problems: make scoreboard PROBLEMS=FOLDER"; exit 1; }
	$(RUN) benchmarks/scoreboard.py $(PROBLEMS)

faults: $(STAMP)  ## Do every fault of docs/reliability.md, write its table (about 3 minutes)
	$(RUN) -m benchmarks.faults

kills: $(STAMP)  ## Kill a training 200 times at random moments, compare every bit with one left alone
	KILLS=200 $(RUN) -m pytest -s tests/echoir/test_kills.py

test: $(STAMP)  ## Run the tests, on as many cores as there are
	$(RUN) -m pytest -n auto --maxprocesses 8

MINUTES ?= 0
fuzz: $(STAMP)  ## Run the property tests with fresh random examples, again until MINUTES=... are over
	@end=$$(($$(date +%s) + 60 * $(MINUTES))); while :; do \
		$(RUN) -m pytest -m hypothesis --hypothesis-profile=fuzz || exit 1; \
		[ $$(date +%s) -lt $$end ] || exit 0; \
	done

# What only these two need: `.venv` has it after the first of them.
PROOF := $(VENV)/.proof
$(PROOF): $(STAMP)
	@$(RUN) -m pip install --disable-pip-version-check -q -c constraints.txt -e '.[proof]'
	@touch $@

coverage: $(PROOF)  ## Run the library's tests, fail where they reach less than 95 % of its branches
	$(RUN) -m coverage erase
	$(RUN) -m coverage run -m pytest --ignore tests/echoir
	$(RUN) -m coverage combine -q
	$(RUN) -m coverage report

mutants: $(PROOF)  ## Change four files in a thousand ways, fail where the tests see less than 90 % of it
	rm -rf mutants
	OMP_NUM_THREADS=1 $(RUN) -m mutmut run
	$(RUN) benchmarks/mutants.py

lint: $(STAMP)  ## Check style, types and layers
	$(RUN) -m ruff check
	$(RUN) -m ruff format --check
	$(RUN) -m pyright
	$(BIN)/lint-imports --no-logo

fmt: $(STAMP)  ## Format the code, mend what ruff can mend
	$(RUN) -m ruff check --fix
	$(RUN) -m ruff format

PEERS ?= .venv-peers
bench: $(STAMP)  ## Time the library against hand-written torch and its peers, write docs/benchmarks.md (about 15 minutes)
	$(RUN) benchmarks/bench.py --peers $(PEERS)

# Without what they depend on: they run with the torch of .venv, and one of them asks for an older Python.
peers:  ## Install the libraries that `make bench` compares with, into .venv-peers (PEERS=...)
	$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install --disable-pip-version-check -q --no-deps --ignore-requires-python \
		-r benchmarks/peers/requirements.txt

TUTORIALS := stackelberg lasso_path restoration imaml ridge hypercleaning logistic
tutorials: $(STAMP)  ## Run the tutorials, keep what they print and draw for their pages (about 12 minutes)
	cd docs/assets/tutorials && for name in $(TUTORIALS); do \
		$(abspath $(RUN)) ../../tutorials/$$name.py > $$name.txt || exit 1; done

docs: $(STAMP)  ## Build the documentation into site/
	$(RUN) -m mkdocs build --strict

serve: $(STAMP)  ## Serve the documentation on this machine, rebuilding as files change
	$(RUN) -m mkdocs serve

# Tests last, so that pytest's own line ends the output.
check: lint docs test  ## lint + docs + test, as CI runs it

clean:  ## Remove what was built, the environment too
	rm -rf $(VENV) site build dist mutants .coverage* .pytest_cache .ruff_cache .hypothesis .import_linter_cache
