# Everything a newcomer types. Each target sets up what it needs first: a virtual environment (.venv, unless one is active) with the
# versions of requirements-dev.txt, and the extension. A second run finds the stamps and goes straight to work.

SHELL := bash
.DELETE_ON_ERROR:
.PHONY: help demo picture drawings test test-cpp test-cpp-sanitized test-cpp-neon test-cpp-all test-gpu-free test-interpreted test-cuda test-cuda-all test-mutants test-oldest test-rehearsal gpu gpu-report lint docs bench bench-all bench-parts report model build wheel clean

ifdef VIRTUAL_ENV
VENV := $(VIRTUAL_ENV)
else
VENV := $(CURDIR)/.venv
endif
PYTHON := $(VENV)/bin/python
# On a device: the Python that is active, be it of a virtual environment or not; `make gpu GPU_PYTHON=...` names another.
GPU_PYTHON := $(if $(VIRTUAL_ENV),$(VIRTUAL_ENV)/bin/python,python3)
# The environment that `make test-oldest` makes.
OLDEST_PYTHON := build/oldest/env/bin/python
GPU_JSON := bench/results/gpu.json
# Stamps belong to one environment and one checkout.
STAMPS := build/stamps$(subst /,-,$(VENV))
SOURCES := setup.py $(wildcard csrc/*.* csrc/cpu/*.* csrc/cuda/*.* csrc/gpu/*.*)
# What is built: FUSEDMOE_BUILD=cuda, in the environment or behind make, adds the CUDA kernels.
EXTENSION := $(STAMPS)/extension-$(or $(FUSEDMOE_BUILD),cpu)
# Tests of kernels that Triton's interpreter runs: it decides at import, so they have a process of their own.
PARTS := $(addprefix tests/test_,grammar.py systems.py operations.py routes.py dropout.py inputs.py)
INTERPRETED := tests/gpu_free/interpreted tests/test_parity.py $(PARTS) tests/test_half.py::test_parity_in_the_norm \
  $(addprefix tests/test_backward.py::test_, a_loss_on_some_tasks tensors_without_memory tensors_that_lose_their_memory_before_the_backward)
# Tests of the CUDA kernels on the emulator, which takes the place of the extension for a whole process.
EMULATED := tests/cuda_on_cpu/emulated tests/test_parity.py $(PARTS) tests/test_backward.py tests/test_half.py::test_parity
say = @echo "==> $(1)"

help:
	@echo "make demo    train a three-task AdaTT on Census-Income twice, plain and fused; draw build/demo.png"
	@echo "make picture the same, and put the picture into README (docs/demo.png)"
	@echo "make drawings  draw docs/levels.png: one level, and who reads what in MMoE, PLE and AdaTT"
	@echo "make test    run the tests"
	@echo "make test-cpp            run the kernels' own C++ test"
	@echo "make test-cpp-sanitized  the same under the address and undefined-behaviour sanitizers"
	@echo "make test-cpp-neon       the same built for AArch64 and run by qemu-user"
	@echo "make test-cpp-all        all of these, as tests of pytest, and the accuracy of many random networks"
	@echo "make test-gpu-free       the GPU kernels' slow tests that need no device: compiled for every architecture, executed"
	@echo "make test-interpreted    every case in Triton's interpreter, of which make test has some"
	@echo "make test-cuda           the CUDA kernels on the tests' emulator of a device: the parity tests, modules, swap"
	@echo "make test-cuda-all       the same under every schedule and the sanitizers; and the emulator's own slow tests"
	@echo "make test-mutants        the tests of the GPU kernels on mutants, of which make test has some; after a change of the tests"
	@echo "make test-oldest         the core of the tests with the versions of requirements-oldest.txt, and every torch's headers; downloads 3 GB once"
	@echo "make test-rehearsal      make gpu on a stub of CUDA's driver, with the versions of make test-oldest: all but the kernels runs"
	@echo "make gpu     on a machine with a device: parity, times, counters, in ten minutes; PART=b runs one part, RESUME=1 what is still missing"
	@echo "make gpu-report          write bench/results/gpu.md from what it measured"
	@echo "make lint    run ruff and mypy"
	@echo "make docs    build the pages of docs/ and the API reference into build/docs; a warning is an error"
	@echo "make bench   time what the backend's floors name, ten minutes to an hour by machine; save bench/results/cpu.json"
	@echo "make bench-all  the whole grid, hours; goes on where an earlier run of the same commit stopped"
	@echo "make bench-parts  time DML, a mix of given vectors and a fresh route; save bench/results/parts.json"
	@echo "make report  write README's speeds, docs/speed.md and the pictures from that JSON"
	@echo "make model   write docs/gpu_model.md's tables of times modelled from the kernels' plans; no GPU is needed"
	@echo "make build   set up and build the extension only; FUSEDMOE_BUILD=cuda adds the CUDA kernels, here and wherever make builds"
	@echo "make wheel   build a wheel, install it elsewhere and run it there"
	@echo "make clean   remove what make built, .venv included"

demo: build
	$(call say,training twice on Census-Income: the reference layers, then fused)
	@$(PYTHON) -m fusedmoe demo --picture build/demo.png

picture: demo
	@cp build/demo.png docs/demo.png

drawings: build
	@$(PYTHON) bench/drawings.py

test: build
	$(call say,running the tests)
	@# Two workers on two cores: two threads in each would wait for one another.
	@OMP_NUM_THREADS=1 $(PYTHON) -m pytest -n 2 -p no:benchmark
	$(call say,running the Triton kernels in the interpreter)
	@OMP_NUM_THREADS=1 TRITON_INTERPRET=1 $(PYTHON) -m pytest -n 2 -p no:benchmark $(INTERPRETED)
	$(call say,running the CUDA kernels on an emulated device)
	@OMP_NUM_THREADS=1 FUSEDMOE_CUDA_ON_CPU=plain $(PYTHON) -m pytest -n 2 -p no:benchmark $(EMULATED)

test-cpp: $(STAMPS)/requirements
	$(call say,testing the kernels in C++)
	@$(PYTHON) tests/cpp/run.py plain

test-cpp-sanitized: $(STAMPS)/requirements
	$(call say,testing the kernels in C++ under the sanitizers)
	@$(PYTHON) tests/cpp/run.py sanitized

test-cpp-neon: $(STAMPS)/requirements
	$(call say,testing the kernels in C++ for AArch64)
	@$(PYTHON) tests/cpp/run.py neon

test-cpp-all: build
	$(call say,testing the kernels in C++: as they are built, under the sanitizers, for AArch64)
	@$(PYTHON) -m pytest -n 2 -p no:benchmark -m slow tests/test_cpp_kernels.py
	$(call say,holding gradients of many random networks against float64)
	@OMP_NUM_THREADS=1 $(PYTHON) -m pytest -n 2 -p no:benchmark -m slow tests/test_accuracy.py

test-gpu-free: build
	$(call say,compiling the Triton kernels for every architecture and executing what was compiled)
	@OMP_NUM_THREADS=1 $(PYTHON) -m pytest -n 2 -p no:benchmark -m slow -k "not cuda and not mutant_is_found and not without_a_mutant" tests/gpu_free

test-interpreted: build
	$(call say,running the Triton kernels on every case in the interpreter)
	@OMP_NUM_THREADS=1 TRITON_INTERPRET=1 $(PYTHON) -m pytest -n 2 -p no:benchmark -m slow $(INTERPRETED)

test-cuda: build
	$(call say,running the CUDA kernels on an emulated device)
	@OMP_NUM_THREADS=1 FUSEDMOE_CUDA_ON_CPU=plain $(PYTHON) -m pytest -n 2 -p no:benchmark $(EMULATED)

test-cuda-all: build
	$(call say,running the CUDA kernels under every schedule of the emulated device)
	@OMP_NUM_THREADS=1 FUSEDMOE_CUDA_ON_CPU=plain $(PYTHON) -m pytest -n 2 -p no:benchmark -m slow $(EMULATED)
	$(call say,running the CUDA kernels and the emulator under the sanitizers)
	@OMP_NUM_THREADS=1 $(PYTHON) -m pytest -n 2 -p no:benchmark -m slow -k "not mutant_is_found" tests/test_cuda_on_cpu.py tests/test_cuda_kernels.py
	$(call say,building the CUDA kernels for every architecture)
	@OMP_NUM_THREADS=1 $(PYTHON) -m pytest -n 2 -p no:benchmark -m slow tests/gpu_free/test_cuda_budgets.py tests/gpu_free/test_cuda_extension.py

# One change of a kernel at a time, and the test that must fail with it: run it after a change of the tests. Of each way to find one make test has one.
test-mutants: build
	$(call say,running the tests on mutants of the kernels)
	@OMP_NUM_THREADS=1 $(PYTHON) -m pytest -n 2 -p no:benchmark -m slow -k "mutant" tests/gpu_free/test_mutants.py tests/test_cuda_on_cpu.py tests/test_cuda_kernels.py

test-oldest: build
	$(call say,compiling what knows PyTorch against the headers of every version since the oldest)
	@OMP_NUM_THREADS=1 $(PYTHON) -m pytest -n 2 -p no:benchmark -m slow tests/test_torch_headers.py
	@PYTHON=$(PYTHON) bash .ci/oldest

# -P and --confcutdir: neither this folder nor the tests' own conftest takes part, which want an installed package.
test-rehearsal:
	@[ -x $(OLDEST_PYTHON) ] || { echo "test-rehearsal: expected the environment of make test-oldest in $(OLDEST_PYTHON), found none" >&2; exit 1; }
	$(call say,rehearsing make gpu on a stub of CUDA's driver)
	@OMP_NUM_THREADS=1 $(OLDEST_PYTHON) -P -m pytest -p no:benchmark -m slow --basetemp build/rehearsal --confcutdir tests/rehearsal tests/rehearsal

# No environment is made and no package fetched: what is active must have it all, and gets nothing new.
gpu:
	@$(GPU_PYTHON) bench/gpu.py --json $(GPU_JSON) $(if $(PART),--part $(PART)) $(if $(RESUME),--resume)

gpu-report:
	@$(GPU_PYTHON) bench/gpu_report.py --json $(GPU_JSON)

lint: $(STAMPS)/requirements
	$(call say,checking style and types)
	@$(PYTHON) -m ruff check .
	@$(PYTHON) -m ruff format --check .
	@$(PYTHON) -m mypy

docs: build
	$(call say,building the documentation)
	@$(PYTHON) -m sphinx --quiet --fail-on-warning --keep-going --builder html --doctree-dir build/doctrees docs build/docs

bench: build
	$(call say,timing what the floors name: ten minutes to an hour by machine; keep the machine idle)
	@$(PYTHON) -m fusedmoe bench --grid floors --json bench/results/cpu.json

bench-parts: build
	$(call say,timing what no family has yet)
	@PYTHONPATH=. $(PYTHON) bench/parts.py bench/results/parts.json

bench-all: build
	$(call say,timing the whole grid: hours; keep the machine idle)
	@$(PYTHON) -m fusedmoe bench --grid all --resume --json bench/results/cpu.json

report: $(STAMPS)/requirements
	@$(PYTHON) bench/report.py

model: build
	@$(PYTHON) bench/gpu_model.py --write

build: $(EXTENSION) $(STAMPS)/installed

wheel: build
	$(call say,building a wheel and running it from another folder)
	@PYTHON=$(PYTHON) bash .ci/wheel

clean:
	rm -rf build dist .venv fusedmoe.egg-info fusedmoe/_C.*.so fusedmoe/_cuda.*.so

$(PYTHON):
	$(call say,creating a virtual environment in $(VENV))
	@for python in python3.11 python3.12 python3.13 python3; do \
	  if $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then exec $$python -m venv $(VENV); fi; \
	done; echo "fusedmoe needs Python 3.11 or later, found none; install it (Debian and Ubuntu: apt-get install python3.11-venv)." >&2; exit 1

# An active environment keeps the versions it has and gets what it lacks; our own gets the pinned ones.
$(STAMPS)/requirements: requirements-dev.txt | $(PYTHON)
	$(call say,installing the development requirements into $(VENV))
	@$(PYTHON) -m pip install -qq --disable-pip-version-check -r $(if $(VIRTUAL_ENV),<(sed 's/==[^;]*//' requirements-dev.txt),requirements-dev.txt)
	@# For its headers, which say what lane holds which number; its Python wants much that nobody here needs.
	@$(PYTHON) -m pip install -qq --disable-pip-version-check --no-deps nvidia-cutlass==4.2.0.0
	@mkdir -p $(@D) && touch $@

$(EXTENSION): $(SOURCES) $(STAMPS)/requirements
	$(call say,building the extension)
	@$(PYTHON) setup.py --quiet build_ext --inplace
	@# A build without the CUDA kernels takes away those of an earlier one.
	@rm -f $(STAMPS)/extension-*
	@touch $@

$(STAMPS)/installed: pyproject.toml setup.py $(EXTENSION)
	@if [ ! -e $@ ] || [ pyproject.toml -nt $@ ] || [ setup.py -nt $@ ]; then \
	  echo "==> installing fusedmoe into $(VENV), as a link to this folder"; \
	  $(PYTHON) -m pip install -qq --disable-pip-version-check --no-build-isolation --no-deps --editable .; \
	fi
	@touch $@
