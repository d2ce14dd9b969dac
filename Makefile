# make help
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
PYTEST_ARGS ?=
# CPU torch where there is no NVIDIA GPU; TORCH=... overrides.
TORCH ?= $(shell command -v nvidia-smi >/dev/null 2>&1 && echo 'torch>=2.8' || echo 'torch==2.13.0')
TORCH_INDEX ?=
export HF_HUB_OFFLINE = 1
export TRANSFORMERS_OFFLINE = 1

.PHONY: help demo test test-slow lint types format hooks test-oldest test-comfyui test-web test-cluster sanitize gpu clean

help: ## this list
	@sed -n 's/^\([a-z-]*\):[^#]*## /\1\t/p' Makefile | expand -t 16

$(VENV)/.ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -m pip install -q $(TORCH_INDEX) '$(TORCH)'
	$(BIN)/python -m pip install -q -e '.[dev]'
	touch $@

demo: $(VENV)/.ready ## set up .venv and make out/demo.mp4: no GPU, no downloads of models
	$(BIN)/infinitetalk demo --out out/demo.mp4

# One process per core, each with one thread; four that share the GPU, a file of tests each (-m cuda).
JOBS ?= $(if $(findstring cuda,$(PYTEST_ARGS)),4 --dist loadfile,auto)

PYTEST = OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest -n $(JOBS)

# Without the tests marked slow; PYTEST_ARGS="--slow 1" runs them too, "--slow 0.3 --slow-seed 7" a part of them.
test: $(VENV)/.ready ## the tests that run on a CPU, without those marked slow; PYTEST_ARGS="-k windows"
	$(PYTEST) $(PYTEST_ARGS)

test-slow: $(VENV)/.ready ## those marked slow
	$(PYTEST) -m slow $(PYTEST_ARGS)

lint: $(VENV)/.ready ## ruff, its format, mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@$(MAKE) --no-print-directory types

format: $(VENV)/.ready ## let ruff format the code and sort its imports
	$(BIN)/ruff check --select I --fix .
	$(BIN)/ruff format .

# mypy names a package after its folder; the link gives the repository root the package's name.
types: $(VENV)/.ready ## mypy
	@mkdir -p .build && ln -sfn .. .build/wanvideo_infinitetalk
	MYPYPATH=.build $(BIN)/mypy -p wanvideo_infinitetalk

hooks: $(VENV)/.ready ## let git commit run ruff and mypy first
	$(BIN)/python -m pip install -q 'pre-commit>=4.0'
	$(BIN)/pre-commit install

# The lower end of every dependency range. Needs a Python that all of them have wheels for: PYTHON=python3.11.
.venv-oldest/.ready: pyproject.toml tools/lower_bounds.py
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install -q --upgrade pip
	$(PYTHON) tools/lower_bounds.py > .venv-oldest/lower-bounds.txt
	.venv-oldest/bin/python -m pip install -q $(TORCH_INDEX) -r .venv-oldest/lower-bounds.txt
	.venv-oldest/bin/python -m pip install -q -e '.[dev]' -c .venv-oldest/lower-bounds.txt
	touch $@

test-oldest: .venv-oldest/.ready ## with the lower end of every dependency range; PYTHON=python3.11
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} .venv-oldest/bin/python -m pytest -n $(JOBS) $(PYTEST_ARGS)

# A real ComfyUI with this pack, over its API and in headless Chromium; see docs/comfyui.md. COMFYUI_PYTHON is a Python
# with ComfyUI's requirements and ours.
COMFYUI_PYTHON ?= .venv-comfyui/bin/python
test-comfyui: $(VENV)/.ready ## a real ComfyUI with this pack; COMFYUI=<folder>
	@test -n "$(COMFYUI)" || { echo 'test-comfyui needs COMFYUI=<folder of a ComfyUI checkout>'; exit 2; }
	$(BIN)/python -m pip install -q playwright
	COMFYUI="$(abspath $(COMFYUI))" COMFYUI_PYTHON="$(abspath $(COMFYUI_PYTHON))" \
		$(BIN)/python -m pytest tests/comfyui -m comfyui $(PYTEST_ARGS)

# The page, in an environment of its own: Gradio needs transformers 5.
.venv-web/.ready: pyproject.toml
	$(PYTHON) -m venv .venv-web
	.venv-web/bin/python -m pip install -q --upgrade pip
	.venv-web/bin/python -m pip install -q $(TORCH_INDEX) '$(TORCH)'
	.venv-web/bin/python -m pip install -q -e '.[dev,web]' playwright
	touch $@

test-web: .venv-web/.ready ## the page, in headless Chromium too
	.venv-web/bin/python -m pytest tests/unit/test_service_page.py tests/web --slow 1 $(PYTEST_ARGS)

# Jobs on a local Ray cluster, in an environment of its own: Ray is large, and starting two nodes takes a while.
.venv-cluster/.ready: pyproject.toml
	$(PYTHON) -m venv .venv-cluster
	.venv-cluster/bin/python -m pip install -q --upgrade pip
	.venv-cluster/bin/python -m pip install -q $(TORCH_INDEX) '$(TORCH)'
	.venv-cluster/bin/python -m pip install -q -e '.[dev,cluster]'
	touch $@

test-cluster: .venv-cluster/.ready ## jobs on a Ray cluster of two local nodes
	OMP_NUM_THREADS=1 .venv-cluster/bin/python -m pytest tests/unit/test_service_cluster.py $(PYTEST_ARGS)

# The reduced GPU set under NVIDIA's memory checker. Without the caching allocator it sees reads past a tensor's end.
sanitize: $(VENV)/.ready ## the reduced GPU set under NVIDIA's memory checker
	PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --report-api-errors no --error-exitcode 1 \
		$(BIN)/python -m pytest tests/cuda/test_reduced_cuda.py $(PYTEST_ARGS)

# The suite, the memory checker, the benchmarks and the doctor on a GPU machine, each with a log; GPU_ARGS="--gpus 4 tests:"
GPU_ARGS ?=
gpu: $(VENV)/.ready ## suite, memory checker, benchmarks and doctor on a GPU machine; writes docs/cuda-results.md
	$(BIN)/python tools/gpu_run.py $(GPU_ARGS)

clean: ## remove what make has made
	rm -rf .venv .venv-oldest .venv-web .venv-cluster .build build *.egg-info out
