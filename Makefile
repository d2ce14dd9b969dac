# make demo | test | test-slow | lint | test-oldest | test-comfyui COMFYUI=<folder>
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
PYTEST_ARGS ?=
# CPU torch where there is no NVIDIA GPU; TORCH=... overrides.
TORCH ?= $(shell command -v nvidia-smi >/dev/null 2>&1 && echo 'torch>=2.8' || echo 'torch==2.13.0')
TORCH_INDEX ?=
export HF_HUB_OFFLINE = 1
export TRANSFORMERS_OFFLINE = 1

.PHONY: demo test test-slow lint test-oldest test-comfyui sanitize gpu clean

$(VENV)/.ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -m pip install -q $(TORCH_INDEX) '$(TORCH)'
	$(BIN)/python -m pip install -q -e '.[dev]'
	touch $@

demo: $(VENV)/.ready
	$(BIN)/infinitetalk demo --out out/demo.mp4

# One process per core, each with one thread; four that share the GPU, a file of tests each (-m cuda).
JOBS ?= $(if $(findstring cuda,$(PYTEST_ARGS)),4 --dist loadfile,auto)

PYTEST = OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest -n $(JOBS)

# Without the tests marked slow; PYTEST_ARGS="--slow 1" runs them too, "--slow 0.3 --slow-seed 7" a part of them.
test: $(VENV)/.ready
	$(PYTEST) $(PYTEST_ARGS)

test-slow: $(VENV)/.ready
	$(PYTEST) -m slow $(PYTEST_ARGS)

# mypy names a package after its folder; the link gives the repository root the package's name.
lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	mkdir -p .build && ln -sfn .. .build/wanvideo_infinitetalk
	MYPYPATH=.build $(BIN)/mypy -p wanvideo_infinitetalk

# The lower end of every dependency range. Needs a Python that all of them have wheels for: PYTHON=python3.11.
.venv-oldest/.ready: pyproject.toml tools/lower_bounds.py
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install -q --upgrade pip
	$(PYTHON) tools/lower_bounds.py > .venv-oldest/lower-bounds.txt
	.venv-oldest/bin/python -m pip install -q $(TORCH_INDEX) -r .venv-oldest/lower-bounds.txt
	.venv-oldest/bin/python -m pip install -q -e '.[dev]' -c .venv-oldest/lower-bounds.txt
	touch $@

test-oldest: .venv-oldest/.ready
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} .venv-oldest/bin/python -m pytest -n $(JOBS) $(PYTEST_ARGS)

# A real ComfyUI with this pack, over its API and in headless Chromium; see docs/comfyui.md. COMFYUI_PYTHON is a Python
# with ComfyUI's requirements and ours.
COMFYUI_PYTHON ?= .venv-comfyui/bin/python
test-comfyui: $(VENV)/.ready
	@test -n "$(COMFYUI)" || { echo 'test-comfyui needs COMFYUI=<folder of a ComfyUI checkout>'; exit 2; }
	$(BIN)/python -m pip install -q playwright
	COMFYUI="$(abspath $(COMFYUI))" COMFYUI_PYTHON="$(abspath $(COMFYUI_PYTHON))" \
		$(BIN)/python -m pytest tests/comfyui -m comfyui $(PYTEST_ARGS)

# The reduced GPU set under NVIDIA's memory checker. Without the caching allocator it sees reads past a tensor's end.
sanitize: $(VENV)/.ready
	PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --report-api-errors no --error-exitcode 1 \
		$(BIN)/python -m pytest tests/cuda/test_reduced_cuda.py $(PYTEST_ARGS)

# The suite, the memory checker, the benchmarks and the doctor on a GPU machine, each with a log; GPU_ARGS="--gpus 4 tests:"
GPU_ARGS ?=
gpu: $(VENV)/.ready
	$(BIN)/python tools/gpu_run.py $(GPU_ARGS)

clean:
	rm -rf .venv .venv-oldest .build build *.egg-info out
