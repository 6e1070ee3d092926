PYTHON ?= python3
BIN := .venv/bin
CASE ?= bench
INSTALLED := .venv/installed
# Modules that are tested have AMX as plain C++, too: few machines have its instructions.
EMULATED_AMX := UBP_EMULATED_AMX=ON
SOURCES := pyproject.toml constraints.txt CMakeLists.txt $(shell find csrc -type f)

.PHONY: demo test test-clang test-arm64 test-minimum test-newest docs lint format torture bench wheel smoke sanitize triton

demo: $(INSTALLED)  ## real retail purchases -> profiles, scores, report
	$(BIN)/python -m ubp_fast.run

test: $(INSTALLED)
	$(BIN)/python -m pytest

torture: $(INSTALLED)  ## 100 times SIGKILL in all stages of a run, each continued to the same bytes; says where each hit
	$(BIN)/python -m pytest tests/pipeline/test_torture.py -k killed_anywhere --kills 100 -s

docs: $(INSTALLED)  ## the documentation as a site, in site/: strict, and without network
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

lint: $(INSTALLED)  ## reports, never edits
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files '*.cpp' '*.h')

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(git ls-files '*.cpp' '*.h')

bench: $(INSTALLED)  ## make bench CASE=flash_attention
	$(BIN)/python -m pytest benchmarks -k "$(CASE)"

# Twice, in the checkout and from the sdist elsewhere, to the same bytes. What is built here asks for this machine's glibc;
# cibuildwheel (pyproject.toml) builds for older ones and for aarch64.
RELEASE = SOURCE_DATE_EPOCH=$$(git log -1 --format=%ct) PIP_CONSTRAINT=$(CURDIR)/constraints.txt
wheel: $(INSTALLED)  ## sdist and wheel in dist/, reproducible and fit for an index
	rm -rf dist build/wheel
	$(RELEASE) $(BIN)/python -m build --sdist --outdir dist .
	$(RELEASE) $(BIN)/pip wheel --quiet --no-deps -w build/wheel/checkout .
	$(RELEASE) $(BIN)/pip wheel --quiet --no-deps -w build/wheel/sdist dist/*.tar.gz
	cmp build/wheel/checkout/*.whl build/wheel/sdist/*.whl
	$(RELEASE) PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/auditwheel repair -w dist build/wheel/sdist/*.whl
	$(BIN)/twine check --strict dist/*

# A line for a new environment: it finds what .venv has, but not this package.
BORROWED = $(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" \
  > "$$($(1)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/borrowed.pth"

# Borrows what the wheel needs from .venv; make smoke WITH=constraints-minimum.txt installs all of it instead.
SMOKE := build/smoke/environment
smoke: $(INSTALLED)  ## the wheel in a new environment without compilers: doctor, the README's Python, a run
	rm -rf build/smoke
	$(RELEASE) $(BIN)/pip wheel --quiet --no-deps -w build/smoke .
	$(PYTHON) -m venv $(SMOKE)
ifdef WITH
	$(SMOKE)/bin/pip install --quiet -c $(WITH) "$$(ls build/smoke/*.whl)[evaluate]"
else
	$(SMOKE)/bin/pip install --quiet --no-deps build/smoke/*.whl
	$(call BORROWED,$(SMOKE))
endif
	cd build/smoke && env PATH=$(CURDIR)/$(SMOKE)/bin python $(CURDIR)/tests/smoke.py

# The compiled module by the other compiler, warnings as errors, in an environment that borrows the rest from .venv.
CLANG ?= clang++
TESTS ?= $(addprefix tests/kernels/test_,core.py flash_attention.py flash_attention_fuzz.py nt_xent.py \
  nt_xent_native.py nt_xent_rectangular.py row_product.py row_sparse.py)
test-clang: build/clang/installed  ## make test-clang CLANG=clang++-19 TESTS=tests
	build/clang/bin/python -m pytest $(TESTS)

build/clang/installed: $(SOURCES) $(INSTALLED)
	@command -v $(CLANG) > /dev/null || { echo "no $(CLANG) here: install Clang, or name one with CLANG=" >&2; exit 1; }
	$(PYTHON) -m venv --clear build/clang
	$(call BORROWED,build/clang)
	$(EMULATED_AMX) CXX=$(CLANG) CXXFLAGS=-Werror build/clang/bin/pip install --quiet --no-deps \
	  -C build-dir=build/clang/core -e .
	touch $@

# Cross-compiled, and run by QEMU as two processors: one with BFMMLA and BFDOT, and one without.
ARM64 ?= aarch64-linux-gnu-g++
EMULATED := qemu-aarch64 -L /usr/aarch64-linux-gnu
test-arm64:  ## the kernels on ARM64: warnings as errors, compared with plain sums
	cmake -S . -B build/arm64 -DCMAKE_BUILD_TYPE=Release -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
	  -DCMAKE_CXX_COMPILER=$(ARM64) -DCMAKE_CXX_FLAGS=-Werror -DUBP_KERNEL_TEST=ON
	cmake --build build/arm64 -j 2
	$(EMULATED) -cpu max build/arm64/kernel_test base neon_bf16
	$(EMULATED) -cpu cortex-a57 build/arm64/kernel_test base

# Environments of their own below build/, made anew where a list has changed. The PyTorch of the package index brings its
# CUDA libraries: gigabytes each.
test-minimum: build/minimum/installed  ## all tests with the oldest release of everything that is declared
	build/minimum/bin/python -m pytest

test-newest: build/newest/installed  ## all tests with the newest release of everything
	build/newest/bin/python -m pytest

build/minimum/installed: constraints-minimum.txt $(SOURCES)
	$(PYTHON) -m venv build/minimum
	$(EMULATED_AMX) build/minimum/bin/pip install --quiet -C build-dir=build/minimum/core -c $< -e ".[test]"
	touch $@

build/newest/installed: $(SOURCES)
	$(PYTHON) -m venv build/newest
	$(EMULATED_AMX) build/newest/bin/pip install --quiet --upgrade --upgrade-strategy eager \
	  -C build-dir=build/newest/core -e ".[test]"
	touch $@

# GPU machines lag behind: the tiles must compile with the oldest Triton that is supported, too, and for sm_100. `make test`
# compiles them with the installed one.
OLDEST_TRITON := 3.6.0
triton: $(INSTALLED)  ## all tiles of the Triton kernels compiled by the oldest Triton: no spill allowed
	test -d build/triton-$(OLDEST_TRITON) || \
	  $(BIN)/pip install --quiet --no-deps --target build/triton-$(OLDEST_TRITON) triton==$(OLDEST_TRITON)
	PYTHONPATH=build/triton-$(OLDEST_TRITON) $(BIN)/python tests/kernels/compile_triton.py sm_100

sanitize: $(INSTALLED)  ## fuzz of the compiled module under the address and undefined-behaviour sanitizers
	cmake -S . -B build/sanitize -DCMAKE_BUILD_TYPE=Release -DUBP_SANITIZE=address,undefined \
	  -D$(EMULATED_AMX) \
	  -Dpybind11_DIR=$$($(BIN)/python -m pybind11 --cmakedir) -DPython_EXECUTABLE=$(CURDIR)/$(BIN)/python
	cmake --build build/sanitize
	ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1 PYTHONMALLOC=malloc \
	  LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so.6)" \
	  $(BIN)/python tests/kernels/fuzz_core.py build/sanitize 300

$(INSTALLED): $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(EMULATED_AMX) $(BIN)/pip install --quiet -c constraints.txt -e ".[demo,test,bench,docs,lint,release]"
	touch $@
