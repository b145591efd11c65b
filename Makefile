# `make quickstart` trains, evaluates and plots; `make test` lints, checks types and tests.
# `make test-tpu` compiles kernels and steps for TPUs, in an environment of its own, without one; `make test-cuda` does the
# same for NVIDIA's H200 and B200, and `make test-beam` prepares streams by Apache Beam, each in one of its own as well.
# `make docs` builds the pages of docs/ and those that they lead to, with warnings as errors.
# `quickstart`, `test` and `docs` make .venv from PYTHON (3.11 or newer) first; another PYTHON makes it anew.
# `make clean` removes the environments, the pages, and `runs` with all that was trained there.

PYTHON ?= python3
RUNS ?= runs/quickstart
VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet

.PHONY: venv quickstart test test-tpu test-cuda test-beam docs clean
.DELETE_ON_ERROR:

quickstart: .venv/installed-$(VERSION)
	@mkdir -p $(RUNS)
	@for encoding in fire rope; do \
	  $(BIN)/python -m lex_fire.train --config=configs/quickstart.py:encoding=$$encoding \
	    --workdir=$(RUNS)/$$encoding || exit $$?; \
	done
	@$(BIN)/python -m lex_fire.evaluate --workdir=$(RUNS)/fire,$(RUNS)/rope
	@echo 'next: look at $(RUNS)/evaluations/fire_rope_same_tokens.png, then train another encoding (alibi, t5, xpos,' \
	  'fire_s, ...): $(BIN)/python -m lex_fire.train --config=configs/quickstart.py:encoding=alibi' \
	  '--workdir=$(RUNS)/alibi'

# The environment alone, of what the commands need.
venv: .venv/installed-$(VERSION)

test: .venv/tested-$(VERSION)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/python -m pytest -q -rs -n auto --maxprocesses 8 --dist loadfile --durations=10

# Of the files that it imports, none needs what requirements.txt has besides.
test-tpu: .venv-tpu/installed-$(VERSION)
	JAX_PLATFORMS=cpu .venv-tpu/bin/python -m pytest -q -rs tests/compile_tpu_test.py tests/compile_command_tpu_test.py \
	  tests/notebooks_test.py

test-cuda: .venv-cuda/installed-$(VERSION)
	JAX_PLATFORMS=cpu .venv-cuda/bin/python -m pytest -q -rs tests/compile_cuda_test.py

test-beam: .venv-beam/installed-$(VERSION)
	JAX_PLATFORMS=cpu .venv-beam/bin/python -m pytest -q -rs tests/prepare_beam_test.py

docs: .venv/documented-$(VERSION)
	$(BIN)/python -m sphinx -E -W --keep-going -q -b html -c docs . docs/_build/html
	@echo 'open docs/_build/html/docs/index.html'

.venv-tpu/installed-$(VERSION): requirements-tpu.txt
	$(PYTHON) -m venv --clear .venv-tpu
	@echo 'installing the compiler for TPU into .venv-tpu (a minute)'
	@.venv-tpu/bin/python -m pip --disable-pip-version-check install --quiet -r requirements-tpu.txt
	@touch $@

.venv-cuda/installed-$(VERSION): requirements-cuda.txt
	$(PYTHON) -m venv --clear .venv-cuda
	@echo "installing the compiler for NVIDIA's GPUs into .venv-cuda (a minute)"
	@.venv-cuda/bin/python -m pip --disable-pip-version-check install --quiet -r requirements-cuda.txt
	@touch $@

.venv-beam/installed-$(VERSION): requirements.txt requirements-beam.txt
	$(PYTHON) -m venv --clear .venv-beam
	@echo 'installing requirements and Apache Beam into .venv-beam (a few minutes)'
	@.venv-beam/bin/python -m pip --disable-pip-version-check install --quiet -r requirements-beam.txt
	@touch $@

.venv/installed-$(VERSION): requirements.txt
	@command -v $(PYTHON) >/dev/null || { \
	  echo 'error: there is no $(PYTHON); give one of 3.11 or newer: make PYTHON=python3.12' >&2; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo 'error: $(PYTHON) is Python $(VERSION); use 3.11 or newer: make PYTHON=python3.12' >&2; exit 2; }
	@test -e $@ || $(PYTHON) -m venv --clear .venv || { \
	  echo 'error: no venv; on Debian and Ubuntu: apt install python3-venv' >&2; exit 2; }
	@echo 'installing requirements into .venv (a few minutes the first time)'
	@$(PIP) -r requirements.txt
	@touch $@

.venv/tested-$(VERSION): .venv/installed-$(VERSION) requirements-gcs.txt requirements-dev.txt
	@$(PIP) -r requirements-dev.txt
	@touch $@

.venv/documented-$(VERSION): .venv/installed-$(VERSION) requirements-docs.txt
	@$(PIP) -r requirements-docs.txt
	@touch $@

clean:
	rm -rf .venv .venv-tpu .venv-cuda .venv-beam runs docs/_build
