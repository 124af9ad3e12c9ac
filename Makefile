# Set-up and the common commands. Each target makes what it needs, so that one command suffices on a fresh clone.
#   PYTHON=/path/to/python   which Python to build .venv with (default: found by .ci/find_python.sh)
#   EXTRAS=gpu               extras of the distribution to install beside the target's own (gpu, tpu; comma-separated)
#   ARGS="..."               arguments for the program behind the target

VENV := .venv
PY := $(VENV)/bin/python
EXTRAS ?=
ARGS ?=

comma := ,
# One stamp per set of extras, touched last: an interrupted or failed install leaves none behind.
stamp = $(VENV)/.installed-$(if $(and $(1),$(EXTRAS)),$(1)$(comma)$(EXTRAS),$(or $(1),$(EXTRAS),base))

export PYTHON

.DELETE_ON_ERROR:
.PHONY: help serve test test-long test-clients test-cluster test-browser tpu-check check format bench soak bench-host bench-scheduling bench-static bench-models wheel clean

help: ## show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "make %-17s %s\n", $$1, $$2}'

$(VENV)/.created: .ci/find_python.sh
	python=$$(sh .ci/find_python.sh) && "$$python" -m venv --clear $(VENV)
	@touch $@

$(VENV)/.installed-%: pyproject.toml $(VENV)/.created
	$(PY) -m pip install --no-input --disable-pip-version-check --quiet --editable '.$(if $(filter-out base,$*),[$*])' </dev/null
	@touch $@

serve: $(call stamp) ## serve the default model on 127.0.0.1:8000
	$(VENV)/bin/jax-engine serve $(ARGS)

test: $(call stamp,test) ## run the tests
	$(PY) -m pytest $(ARGS)

test-long: $(call stamp,test) ## the tests that take minutes
	$(PY) -m pytest -m long $(ARGS)

test-clients: $(call stamp,clients) ## real clients of other makers against the server
	$(PY) -m pytest -m long tests/test_clients.py $(ARGS)

test-cluster: $(call stamp,cluster) ## several servers: Ray Serve, and vllm-router in front
	$(PY) -m pytest -m long tests/test_ray_app.py tests/test_router.py $(ARGS)

test-browser: $(call stamp,browser) ## the page in headless Chromium, which must be on the machine
	$(PY) -m pytest -m long tests/test_page_browser.py $(ARGS)

tpu-check: $(call stamp,test$(comma)tpu) ## compile the kernels and steps for TPUs that are not here
	$(PY) -m pytest -m "long or not long" tests/test_tpu_compile.py $(ARGS)

check: $(call stamp,check) ## formatting, lint, types, import contracts, tests
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/pyright --pythonpath $(PY)
	$(VENV)/bin/lint-imports --no-cache
	$(PY) -m pytest $(ARGS)

format: $(call stamp,check) ## format the sources and mend what lint can mend
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

bench: $(call stamp) ## offline benchmark; ARGS="--workload=... --compare=static,sync,async"
	$(PY) -m benchmarks.offline $(ARGS)

soak: $(call stamp) ## ten minutes of load with clients that leave; fails if anything leaks or changes
	$(PY) -m benchmarks.soak $(ARGS)

bench-host: $(call stamp) ## host cost of a scheduler step, no device
	$(PY) -m benchmarks.scheduler_host $(ARGS)

bench-scheduling: $(call stamp) ## what each scheduling decision is worth, in virtual time
	$(PY) -m benchmarks.scheduling $(ARGS)

bench-static: $(call stamp) ## the same lengths with transformers' generate, one static batch
	$(PY) -m benchmarks.hf_static $(ARGS)

bench-models: $(call stamp) ## compile time and memory of models' steps; ARGS="--models=FOLDER,..."
	$(PY) -m benchmarks.models $(ARGS)

wheel: $(call stamp,check) ## build dist/*.whl
	$(PY) -m pip wheel --no-input --disable-pip-version-check --no-deps --wheel-dir dist .

clean: ## remove the virtual environment and caches
	rm -rf $(VENV) dist .pytest_cache .ruff_cache .import_linter_cache
