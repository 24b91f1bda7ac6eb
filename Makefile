# Each target works alone on a machine with git, make, Python 3.11 or newer and pip.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: demo test lint docs lock audit release

demo: .venv/installed
	$(BIN)/bloblora demo

test: .venv/installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadscope

lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: .venv/installed-dev
	$(BIN)/mkdocs build --strict

# The lock file: what CI installs, with hashes, for every platform and Python from 3.11. torch isn't in it, for which
# build is right is the machine's to say (CPU, CUDA, ROCm): constraints.txt has its version.
OF_TORCH := torch triton $(addprefix cuda-,bindings pathfinder toolkit) $(addprefix nvidia-,cublas cuda-cupti \
  cuda-nvrtc cuda-runtime cudnn-cu13 cufft cufile curand cusolver cusparse cusparselt-cu13 nccl-cu13 nvjitlink \
  nvshmem-cu13 nvtx)
LOCKED := requirements.lock tests/methods/laplace-torch.lock

lock:
	uv pip compile pyproject.toml --extra dev --universal --python-version 3.11 --generate-hashes \
	  --constraint constraints.txt $(addprefix --no-emit-package ,$(OF_TORCH)) --no-annotate --no-header \
	  --output-file requirements.lock
	uv pip compile tests/methods/laplace-torch.txt --no-deps --universal --python-version 3.11 --generate-hashes \
	  --no-annotate --no-header --output-file tests/methods/laplace-torch.lock

# Known vulnerabilities in what is locked; it asks PyPI about each version, which many mirrors can't answer. --strict: a
# package that it couldn't ask about is an error.
audit: .venv/installed-dev
	@if $(BIN)/python -c "import httpx; httpx.head('https://pypi.org/pypi/pip/25.0/json').raise_for_status()" 2>/dev/null; \
	then $(BIN)/pip-audit --strict --disable-pip --require-hashes $(addprefix -r ,$(LOCKED)); \
	else echo "audit: skipped, pypi.org can't be asked about versions"; fi

# dist/: source, wheel, and what they were tested with as CycloneDX.
release: .venv/installed-dev
	$(BIN)/hatchling build
	grep "^torch==" constraints.txt | cat requirements.lock - | \
	  $(BIN)/cyclonedx-py requirements - --pyproject pyproject.toml --output-file dist/sbom.cdx.json

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(PIP) -c constraints.txt -e '.[serve]'
	touch $@

.venv/installed-dev: pyproject.toml constraints.txt $(LOCKED)
	$(PYTHON) -m venv .venv
	$(PIP) --require-hashes --no-deps $(addprefix -r ,$(LOCKED))
	$(PIP) -c constraints.txt torch
	$(PIP) --no-deps --no-build-isolation -e .
	touch $@
