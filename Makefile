# make demo | test | bench | docs | lint | study | wheel | matrix | sanitize: each sets up .venv on the first call and never again until
# the dependencies change. ARGS goes to the command: make demo ARGS=--quick, make test ARGS="-k memory".
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
JOBS   ?= 2
ROCM   ?= /opt/rocm
export PIP_DISABLE_PIP_VERSION_CHECK = 1
# Byte code is written for what is imported, at its first import: half of an installation's processor time.
PIP    := -q --no-compile
# PyTorch's own index of CPU builds, asked only when pip's configured index has none.
TORCH_CPU_INDEX ?= https://download.pytorch.org/whl/cpu
SHELL  := /bin/bash

.PHONY: demo test bench docs lint study wheel matrix sanitize setup clean

demo: $(STAMP)
	$(BIN)/python -m benchmarks.demo $(ARGS)

# One thread a worker: two workers with two OpenMP threads each are several times slower than one thread each.
test: $(STAMP)
	OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) $(ARGS)

bench: $(STAMP)
	$(BIN)/python -m pytest benchmarks --benchmark-only --benchmark-columns=median,iqr,rounds $(ARGS)

# The documentation with its search into site/, from docs/ and the docstrings; a link that leads nowhere is an error.
docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet $(ARGS)

# Every method on a small world with a verifiable reward, three seeds, into docs/study.md; ARGS="--rewards FILE" adds real data.
study: $(STAMP)
	$(BIN)/python -m benchmarks.study $(ARGS)

# Into dist/: an sdist, and from it a wheel with the C++ kernels for Python 3.10 and torch 2.11 onwards, named after the oldest
# glibc that it runs on.
wheel: $(STAMP)
	rm -rf dist
	VAR_KERNELS_BUILD_EXT=1 $(BIN)/python -m uv build -q --no-build-isolation --python $(BIN)/python -o dist .
	if ls dist/*-linux_*.whl >/dev/null 2>&1; then \
	  PATH="$(abspath $(BIN)):$$PATH" auditwheel repair --exclude 'libtorch*' --exclude 'libc10*' -w dist dist/*-linux_*.whl \
	  && rm dist/*-linux_*.whl; \
	fi

# Both into clean environments of several versions of Python and of the packages: benchmarks/results/matrix.csv, docs/start.md.
matrix: wheel
	$(BIN)/python -m benchmarks.matrix dist

# The C++ kernels' tests under the address and undefined-behaviour sanitizers.
sanitize: $(STAMP)
	csrc/sanitize.sh $(BIN)/python $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m mypy

setup: $(STAMP)

# Three cases. The interpreter already has torch: keep it (a link in the new environment, nothing downloaded again).
# An NVIDIA driver answers: the CUDA build from the index. Neither: the CPU build named in constraints/cpu.txt, also with
# AMD's ROCm: its builds of torch are on other indexes, one for each release of ROCm.
# The C++ row kernels come last: they are built against the torch that was installed, and are left out without a compiler.
$(STAMP): pyproject.toml setup.py constraints/cpu.txt $(wildcard csrc/*)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python >= 3.10 is needed, $(PYTHON) is %d.%d: make PYTHON=python3.12" % sys.version_info[:2])'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@set -e; \
	if $(PYTHON) -c 'import torch' 2>/dev/null; then \
	  echo "setup: keeping the torch of $(PYTHON)"; \
	  $(PYTHON) -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/parent.pth"; \
	  $(BIN)/python -m pip install $(PIP) -e '.[dev]' || { \
	    echo "setup: no package index answered; going on with the packages that are here"; \
	    $(BIN)/python -m pip install -q --no-index --no-deps --no-build-isolation -e .; }; \
	elif nvidia-smi -L >/dev/null 2>&1; then \
	  echo "setup: NVIDIA driver found, installing the CUDA build of torch"; \
	  $(BIN)/python -m pip install $(PIP) -e '.[dev]'; \
	else \
	  if command -v rocm-smi >/dev/null || [ -d $(ROCM) ]; then \
	    echo "setup: found ROCm, but no torch in $(PYTHON): installing the CPU build, which leaves the GPU alone"; \
	    echo "setup: for the GPU install PyTorch's ROCm build for $(PYTHON) (pytorch.org names it), then: make clean $(MAKECMDGOALS)"; \
	  else \
	    echo "setup: no NVIDIA GPU found, installing the CPU build of torch (one to three minutes)"; \
	  fi; \
	  $(BIN)/python -m pip install $(PIP) -c constraints/cpu.txt -e '.[dev]' \
	    || $(BIN)/python -m pip install $(PIP) -c constraints/cpu.txt --extra-index-url $(TORCH_CPU_INDEX) -e '.[dev]' || { \
	    echo "setup: failed. Give an index that holds the '+cpu' build of torch: make $(MAKECMDGOALS) TORCH_CPU_INDEX=URL"; exit 1; }; \
	fi
	@if ! command -v $(CXX) >/dev/null; then \
	  echo "setup: no C++ compiler ($(CXX)); the row kernels run in plain torch"; \
	elif VAR_KERNELS_BUILD_EXT=1 $(BIN)/python -m pip install -q --no-index --no-deps --no-build-isolation -e . >$(VENV)/build.log 2>&1; then \
	  echo "setup: built the C++ row kernels"; \
	else \
	  echo "setup: the C++ row kernels did not build ($(VENV)/build.log says why); they run in plain torch"; \
	fi
	@touch $@

clean:
	rm -rf $(VENV) build dist site *.egg-info runs var_kernels/kernels/_native.*
