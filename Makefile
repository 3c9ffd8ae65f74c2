PYTHON ?= python3
VENV ?= .venv
# Any arguments of pip install, such as an index. Used only where the environment has no torch yet.
TORCH ?= torch==2.13.0
# As setup.py reads it: auto, none, cpu, cuda or autograd.
export MIXOUT_FAST_BUILD ?= auto
export PATH := $(abspath $(VENV))/bin:$(PATH)

PY := $(VENV)/bin/python
# Under auto, _CUDA.so is no target: beside a CUDA torch the command for _C.so builds it too.
LIBRARY := mixout_fast/_C.so $(if $(filter cuda,$(MIXOUT_FAST_BUILD)),mixout_fast/_CUDA.so)
SOURCES := $(wildcard csrc/*.cpp csrc/*.h csrc/autograd/* csrc/cpu/* csrc/cuda/*)
FORMATTED := $(wildcard csrc/*.cpp csrc/*.h csrc/*/*.cpp csrc/*/*.h csrc/*/*.inl csrc/*/*.cu csrc/*/*.cuh tests/*.cpp)

# The tests to repeat with the CUDA kernels emulated on the CPU; the others reach no kernel, or in the same ways.
EMULATED := $(addprefix tests/test_,cuda_kernels.py autograd.py mixout.py philox.py random_cases.py)
# Triton's interpreter is slow: left out are tests that depend on no kernel, and repetitions in one pass of tests whose
# outcome does not depend on how products are computed.
INTERPRETED := $(addprefix tests/test_,agreement.py autograd.py philox.py triton.py) \
  -k "not bytes_saved and not (one_pass and (bits_of_mask or weight_equal or column_major))"

.PHONY: bench gpu test ctest lint format build clean

# The main benchmarks, in ten minutes. Without arguments benchmarks.run measures more, in a quarter of an hour or so.
bench: build $(VENV)/.bench
	$(PY) -m benchmarks.run --suite layer --targets --budget 120
	$(PY) -m benchmarks.run --suite model --models minilm --modes eager --precisions fp32
	$(PY) -m benchmarks.run --suite memory --models minilm
	$(PY) -m benchmarks.finetune
	$(PY) -m benchmarks.report

# Uses the present Python and its torch: no virtual environment, and nothing is installed.
gpu:
	benchmarks/gpu.sh

test: build ctest
	$(PY) -m pytest $(PYTEST_ARGS)
	$(PY) -m pytest --emulate-cuda $(EMULATED) $(PYTEST_ARGS)
	@if $(PY) -c "import triton" 2>/dev/null; then \
	  echo "Triton's kernels in its interpreter" && \
	  TRITON_INTERPRET=1 $(PY) -m pytest $(PYTEST_ARGS) $(INTERPRETED); \
	else echo "triton is not installed: the tests of its kernels are left out"; fi
	$(PY) -m mixout_fast check

ctest:
	@if command -v cmake >/dev/null && command -v c++ >/dev/null; then \
	  cmake -S . -B build/headers -DMIXOUT_FAST_LIBRARY=OFF && cmake --build build/headers && \
	  ctest --test-dir build/headers --output-on-failure; \
	else echo "cmake or a C++ compiler is missing: the C++ test of the headers is left out"; fi

lint: $(VENV)/.lint
	ruff check .
	ruff format --check .
	clang-format --dry-run -Werror $(FORMATTED)

format: $(VENV)/.lint
	ruff check --fix .
	ruff format .
	clang-format -i $(FORMATTED)

build: $(VENV)/.installed $(LIBRARY)

# Without a compiler no library is built and the package works without one; the next make tries again.
$(LIBRARY) &: setup.py $(SOURCES) | $(VENV)/.installed
	$(PY) setup.py -q build_ext --inplace
	@for library in $(LIBRARY); do if [ -e $$library ]; then touch $$library; fi; done

# MIXOUT_FAST_BUILD=none: this rule only installs a link to the tree; the rule above builds into it.
$(VENV)/.installed: pyproject.toml setup.py
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -c "import torch" 2>/dev/null || $(PY) -m pip install $(TORCH)
	$(PY) -m pip install "setuptools>=77" ninja
	MIXOUT_FAST_BUILD=none $(PY) -m pip install --no-build-isolation -e ".[test,stack]"
	touch $@

$(VENV)/.bench: benchmarks/requirements.txt | $(VENV)/.installed
	$(PY) -m pip install -r $<
	touch $@

$(VENV)/.lint: pyproject.toml | $(VENV)/.installed
	MIXOUT_FAST_BUILD=none $(PY) -m pip install --no-build-isolation -e ".[lint]"
	touch $@

clean:
	rm -rf build dist mixout_fast.egg-info mixout_fast/*.so .pytest_cache .ruff_cache
