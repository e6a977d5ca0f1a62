# Everything here sets up what it needs in .venv; the only things wanted beforehand are python3 (3.11 or newer), git and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help demo test test-oldest docs wheels sdist platform-wheels lint format golden sanitize sanitized fuzz fuzz-operators faults bench bench-8b clean

help:
	@echo "make demo      export the bundled checkpoint as fp32 and q4, prove it, generate text from both"
	@echo "make test      run the tests"
	@echo "make test-oldest  run them with the versions of oldest.txt, in .venv-oldest"
	@echo "make docs      build the documentation's site into build/site, look at its links, run its code"
	@echo "make sdist     build the source distribution into dist/"
	@echo "make wheels    build the wheels into dist/: lfm2-export, the bundled checkpoints' own, and optimum-cli's command"
	@echo "make platform-wheels  and those with the compiled operators for Linux on x86-64 and aarch64; prove this machine's"
	@echo "make lint      ruff format and check, mypy"
	@echo "make sanitize  run the C++ kernels' and operators' tests under AddressSanitizer and UndefinedBehaviorSanitizer"
	@echo "make fuzz      fuzz the readers of files for MINUTES=5 (of one: TARGET=checkpoint); Linux on x86-64"
	@echo "make fuzz-operators  call the operators wrongly for MINUTES=5, half of them under the sanitizers"
	@echo "make faults    make an export and its readers fail, or be killed, at every read and write (ten minutes; Linux)"
	@echo "make golden    write golden_outputs/ anew (after the bundled checkpoints changed)"
	@echo "make bench     time llama.cpp, ONNX and .pte side by side at 350M and 1.2B (minutes; 8 GB of disk; a quiet machine)"
	@echo "make bench-8b  the same for the 8B (half an hour; 45 GB of disk, 12 GB of memory)"

# torch is installed by its exact version and first: a local CPU build is then taken where pip is set up to find one,
# and no other package can pull in another build.
$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("lfm2-export needs Python 3.11 or newer, this is " + sys.version.split()[0]) if sys.version_info < (3, 11) else None'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

demo: $(STAMP)
	$(BIN)/lfm2-export demo

# Two processes: the tests are many small exports, which a second core halves. Our operators are compiled before, where
# there is a compiler, so that no test waits for it.
test: $(STAMP)
	-$(BIN)/python -m lfm2_export.kernels
	$(BIN)/python -m pytest -n 2 --dist worksteal -q

# .venv has the newest versions that are taken; these are the oldest that the whole suite is for.
OLDEST := .venv-oldest
$(OLDEST)/.installed: pyproject.toml oldest.txt
	test -x $(OLDEST)/bin/python || $(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check --constraint oldest.txt --editable '.[dev]'
	@touch $@

test-oldest: $(OLDEST)/.installed
	$(OLDEST)/bin/python -m pytest -n 2 --dist worksteal -q

docs: $(STAMP)
	$(BIN)/python -m documentation
	$(BIN)/python -m pytest -q tests/documentation

# MANIFEST.in says what is in it: all that a checkout has, so that the suite runs from it.
sdist: $(STAMP)
	$(BIN)/python -m build --sdist --outdir dist .

# setuptools takes up what an earlier build left.
wheels: $(STAMP)
	rm -rf build/lib integrations/*/build
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist . integrations/lfm2-export-demo integrations/optimum-lfm2

# The other machine's library needs its cross compiler (Debian: g++-aarch64-linux-gnu, g++-x86-64-linux-gnu).
PLATFORM := build/platform_wheels
platform-wheels: wheels
	rm -rf $(PLATFORM) dist/lfm2_export-*-manylinux_*.whl
	$(BIN)/python -m platform_wheels linux --into dist --work $(PLATFORM) \
	  dist/lfm2_export-$$($(BIN)/python -c 'import lfm2_export; print(lfm2_export.__version__)')-py3-none-any.whl
	$(BIN)/lfm2-export export tiny-moe --scheme q4 --output $(PLATFORM)/artifact
	$(BIN)/python -m platform_wheels check dist/lfm2_export-*-manylinux_*_$$(uname -m).whl $(PLATFORM)/artifact

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

golden: $(STAMP)
	$(BIN)/python examples/write_golden_outputs.py

# The operators' tests, ONNX Runtime's and ExecuTorch's, once more where a stray read or an overflow ends the process.
sanitized: $(STAMP)
	$(BIN)/cmake -S tests/kernels -B build/sanitized -DLFM2_SANITIZE=address,undefined \
	  -DCMAKE_PREFIX_PATH="$$($(BIN)/python -c 'from lfm2_export.kernels import build; print(build.executorch_folder() / "share/cmake")')"
	$(BIN)/cmake --build build/sanitized --parallel

sanitize: sanitized
	$(BIN)/ctest --test-dir build/sanitized --output-on-failure

MINUTES ?= 5

# Half of the time in C++ under the sanitizers, half in onnxruntime, from another seed each day.
fuzz-operators: sanitized
	build/sanitized/operators_fuzz --seconds $$(($(MINUTES) * 30)) --seed $$(date +%Y%m%d)
	$(BIN)/python -m tests.kernels.operator_fuzz --seconds $$(($(MINUTES) * 30)) --seed $$(date +%Y%m%d)

# New inputs that reached new code stay in build/fuzz, from where the next run goes on.
fuzz: $(STAMP)
	$(BIN)/python -m tests.fuzz.campaign --minutes $(MINUTES) $(addprefix --target ,$(TARGET))

# The suite tries a few places of each.
faults: $(STAMP)
	$(BIN)/python -m tests.faults.everything

# What the comparison makes is kept in BENCH_FILES, so that a second call only measures.
BENCH_FILES ?= $(HOME)/.cache/lfm2-export/benchmarks
BENCH_OPTIONS ?=

bench: $(STAMP)
	$(BIN)/python -m benchmarks.compare 350m 1.2b --keep $(BENCH_FILES) $(BENCH_OPTIONS)

bench-8b: $(STAMP)
	$(BIN)/python -m benchmarks.compare 8b-a1b --keep $(BENCH_FILES) $(BENCH_OPTIONS)

clean:
	rm -rf $(VENV) demo_output build dist *.egg-info
