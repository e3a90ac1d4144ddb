# Type `make` for what there is. Everything runs in .venv, made from requirements.txt and requirements-torch.txt on first use.

# What is given stands as it is: make would expand what a value holds, and run its `$(shell …)`. A
# line of a recipe ends at a line break, inside of quotes, too.
define line_break


endef
$(foreach name,PYTHON MODEL PROFILE LAB JOBS TIMES TEXT CONTEXT REVISION,\
  $(if $(filter command environment,$(firstword $(origin $(name)))),\
    $(if $(findstring $(line_break),$(value $(name))),$(error $(name) holds a line break: use one line))\
    $(eval override $(name) := $$(value $(name)))))
# A variable as one word of the shell, whatever is in it; and whether two are equal.
quoted = '$(subst ','\'',$(1))'
equal = $(if $(subst $(1),,$(2))$(subst $(2),,$(1)),,yes)

PYTHON ?= python3
# Labs of the real model, which `make gemma` fetches; the others are of the minis unless MODEL says.
REAL   := fingerprint lengths peers
OWN    := $(if $(filter $(REAL),$(LAB)),gemma-3-270m,olmoe-mini)
MODEL  ?= $(OWN)
PROFILE ?= mini
# A model of full size is not trained here; the minis all are, and one of them is looked at closely.
# In this order: a lab may read what an earlier one has made.
CLOSELY := $(if $(call equal,olmoe-mini,$(MODEL)),ablation solvers convergence scores kernels)
OPEN    := $(if $(call equal,olmoe-mini,$(MODEL)),values queries second sensitivity) gauge ladder
LAB    ?= $(if $(filter full,$(PROFILE)),,train $(CLOSELY)) architectures $(if $(filter full,$(PROFILE)),,cache $(OPEN))
LAB_OPTIONS = -p model $(call quoted,$(MODEL)) $(if $(filter-out mini,$(PROFILE)),-p profile $(call quoted,$(PROFILE))) \
  $(if $(TEXT),-p text $(call quoted,$(TEXT))) $(if $(CONTEXT),-p context $(call quoted,$(CONTEXT))) \
  $(if $(REVISION),-p revision $(call quoted,$(REVISION))) \
  $(if $(call equal,$(OWN),$(MODEL)),,--out $(call quoted,_build/labs/$(subst /,--,$(MODEL))))

JOBS     ?= 2
BIN      := .venv/bin
STAMP    := .venv/.installed
CHAPTERS := $(sort $(wildcard book/*.ipynb))
BENCHES  := $(sort $(wildcard benchmarks/bench_*.py))

.PHONY: help book html pdf records check-records check-book test-slow lab gemma estimate lint test test-all test-gpu test-browser cross-compile twice bench probe lock clean
.DEFAULT_GOAL := help

help: ## this list
	@echo "signlattice: one-bit keys for the KV cache, and the paper about them, recomputed"
	@echo
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1|\2/p' $(MAKEFILE_LIST) | awk -F'|' '{printf "%-21s %s\n", $$1, $$2}'
	@echo
	@echo $(call quoted,  MODEL=$(MODEL)   LAB="$(strip $(LAB))"   PYTHON=$(PYTHON))
	@echo
	@echo "A model of full size, by its name on the hub or its folder; TEXT is wiki, prose, wikitext, c4 or a file:"
	@echo "  make lab MODEL=OLMoE-1B-7B PROFILE=full [TEXT=…] [CONTEXT=…] [REVISION=…]"

book: $(STAMP) ## execute the chapters and build the book: _build/html/index.html
	$(BIN)/signlattice-paper records --before-run
	$(BIN)/signlattice-paper run $(if $(TIMES),--times) $(CHAPTERS)
	$(if $(TIMES),$(BIN)/signlattice-paper run book/reproduce.ipynb)
	$(MAKE) --no-print-directory html

html: $(STAMP) records ## build the book from the outputs that are in the notebooks
	$(BIN)/jupyter-book build . --all -W -n --keep-going

records: $(STAMP) ## check that every record is the one that its lab would make now
	$(BIN)/signlattice-paper records

pdf: $(STAMP) ## print the built book with Chromium: _build/signlattice.pdf
	$(BIN)/python book/_ext/print_book.py

lab: $(STAMP) ## the heavy notebooks: make lab MODEL=<mini> [LAB=ablation]
	$(BIN)/signlattice-paper run $(foreach lab,$(LAB),$(call quoted,book/lab/$(lab).ipynb)) $(LAB_OPTIONS)

gemma: $(STAMP) ## fetch the pretrained model Gemma 3 270M and the text wiki, once
	$(BIN)/signlattice fetch gemma-3-270m
	$(BIN)/signlattice fetch wiki

estimate: $(STAMP) ## what a full-size model takes: make estimate MODEL=<name or path>
	$(BIN)/signlattice estimate $(call quoted,$(MODEL)) $(if $(REVISION),--revision $(call quoted,$(REVISION))) $(if $(CONTEXT),--context $(call quoted,$(CONTEXT)))

# Each worker takes whole files, so that a chapter's cells run in order. It has one thread, and so
# have the kernels and commands that it starts: more threads than cores take twice as long.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(call quoted,$(JOBS)) --dist loadfile
TESTS  = tests --ignore=tests/browser

test: $(STAMP) ## unit, property, equation and style tests
	$(PYTEST) $(TESTS) --ignore=tests/test_findings.py

test-all: $(STAMP) check-book ## the same with every case of the large products, the records and the chapters
	$(PYTEST) $(TESTS) -m ""

check-book: $(STAMP) ## execute the chapters, and compare what they give with the outputs that they show
	$(PYTEST) $(CHAPTERS) --nbval --nbval-current-env --nbval-sanitize-with tests/nbval.cfg

test-slow: $(STAMP) ## whole commands and processes: an installation, the README's commands, workers, memory
	$(PYTEST) $(TESTS) -m slow

check-records: $(STAMP) records ## that the committed records say what the book says of them
	$(BIN)/python -m pytest tests/test_findings.py

test-gpu: $(STAMP) ## the kernels' tests on a CUDA device, which must be there
	$(BIN)/python -c 'import sys, torch; sys.exit(None if torch.cuda.is_available() else "error: no CUDA device; make test runs these tests in an interpreter")'
	$(BIN)/python -m pytest tests/kernels tests/test_learn.py tests/test_decode_timing.py tests/test_kernel_times.py

cross-compile: $(STAMP) ## compile every variant of every kernel for the A100 and the H100, without one
	@status=0; for arch in 80 90; do \
	  $(BIN)/python benchmarks/cross_compile.py $$arch --all || status=1; done; exit $$status

test-browser: $(STAMP) ## the built book in headless Chromium, cut off from the network
	$(BIN)/python -m pytest -n $(call quoted,$(JOBS)) --dist loadgroup tests/browser --confcutdir=tests/browser

# PyTorch and BLAS sum in the order of the oldest processors, then in that of this one, split in two
twice: $(STAMP) ## execute the chapters as two other machines would, and compare what they say
	OMP_NUM_THREADS=1 ATEN_CPU_CAPABILITY=default MKL_CBWR=COMPATIBLE OPENBLAS_CORETYPE=Prescott \
	  $(BIN)/python -m pytest -q $(CHAPTERS) --nbval --nbval-current-env --nbval-sanitize-with tests/nbval.cfg
	OMP_NUM_THREADS=2 $(BIN)/python -m pytest -q $(CHAPTERS) --nbval --nbval-current-env --nbval-sanitize-with tests/nbval.cfg

lint: $(STAMP) ## style, types, and who imports whom: what the hooks before a commit check, too
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports

bench: $(STAMP) ## time the solvers, and the kernels on the device at hand
	@set -e; for bench in $(BENCHES); do echo "== $$bench"; $(BIN)/python $$bench; done

probe: $(STAMP) ## try many inputs at the edges, by kind, in less than five minutes
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/probe.py

lock: ## raise the pins of requirements.txt as requirements.in allows, with the hash of every file
	@test -x _build/lock/bin/uv || { $(call quoted,$(PYTHON)) -m venv _build/lock && \
	  _build/lock/bin/python -m pip install --disable-pip-version-check uv==0.13.9; }
	_build/lock/bin/uv pip compile --quiet --upgrade --generate-hashes --no-annotate --python-version 3.11.7 \
	  --excludes requirements-torch.txt --custom-compile-command "make lock" -o requirements.txt requirements.in

clean: ## remove what a build leaves; the environment goes with: rm -r .venv
	rm -rf _build build .pytest_cache .hypothesis .ruff_cache .import_linter_cache
	find src tests book benchmarks -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

# The stamp is made last, so that an interrupted installation is taken up again.
$(STAMP): requirements.txt requirements-torch.txt pyproject.toml
	@$(call quoted,$(PYTHON)) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
	  { echo error: $(call quoted,$(PYTHON)) "is not Python 3.11 or newer; name one: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@test -x $(BIN)/python || $(call quoted,$(PYTHON)) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check --no-deps -r requirements.txt
	$(BIN)/python -m pip install --disable-pip-version-check -r requirements-torch.txt
	$(BIN)/python -m pip install --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@
