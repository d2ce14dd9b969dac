# make demo | test | lint | test-oldest | test-comfyui COMFYUI=<folder>
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
PYTEST_ARGS ?=
# CPU torch where there is no NVIDIA GPU; TORCH=... overrides.
TORCH ?= $(shell command -v nvidia-smi >/dev/null 2>&1 && echo 'torch>=2.8' || echo 'torch==2.13.0')
TORCH_INDEX ?=
export HF_HUB_OFFLINE = 1
export TRANSFORMERS_OFFLINE = 1

.PHONY: demo test lint test-oldest clean

$(VENV)/.ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -m pip install -q $(TORCH_INDEX) '$(TORCH)'
	$(BIN)/python -m pip install -q -e '.[dev]'
	touch $@

demo: $(VENV)/.ready
	$(BIN)/infinitetalk demo --out out/demo.mp4

test: $(VENV)/.ready
	$(BIN)/python -m pytest $(PYTEST_ARGS)

# mypy names a package after its folder; the link gives the repository root the package's name.
lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	mkdir -p .build && ln -sfn .. .build/wanvideo_infinitetalk
	MYPYPATH=.build $(BIN)/mypy -p wanvideo_infinitetalk

clean:
	rm -rf .venv .venv-oldest .build build *.egg-info out
