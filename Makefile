# Each target makes .venv by itself. Variables, all optional:
#   PYTHON      the interpreter that .venv is made from (3.11 or later)
#   PIP_ARGS    passed on to pip install, as --extra-index-url for a CPU build of torch
#   RUN_ARGS, TEST_ARGS, BENCH_ARGS, COUNT_ARGS, MEASURE_ARGS, EXPERIMENTS_ARGS   passed on to
#               fedmap-sparse run, pytest, fedmap-sparse bench, benchmarks/instructions.py,
#               tools/measure_gpu.py, experiments/run.py
VENV ?= .venv
BIN := $(VENV)/bin
export PYTHON PIP_ARGS

BUILD_INPUTS := pyproject.toml setup.py constraints.txt tools/venv.sh $(wildcard csrc/*/*)

.PHONY: help run test test-arm test-cross test-gpu-free test-engines test-crash lint docs bench vectors sanitize fuzz fuzz-wire package clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "%-10s %s\n", $$1, $$2 }' Makefile

run: $(VENV)/run.stamp ## the default experiment: FedMap beside dense FedAvg, on CPU
	$(BIN)/fedmap-sparse run $(RUN_ARGS)

.PHONY: experiments
experiments: $(VENV)/run.stamp ## the set of experiments/, an hour on 2 cores; EXPERIMENTS_ARGS=--quick takes minutes
	$(BIN)/python experiments/run.py $(EXPERIMENTS_ARGS)

test: lint ## lint, types and every test
	$(BIN)/python -m pytest --timeout 300 $(TEST_ARGS)

test-arm: ## the kernels for 64-bit ARM, cross-compiled and run under QEMU against the scalar level
	tools/cross_check.sh aarch64

test-cross: ## the same for 32-bit ARM and RISC-V, which have the scalar level alone
	tools/cross_check.sh armhf riscv64

.PHONY: test-ambient
AMBIENT := float64 bfloat16 meta inference autocast deterministic anomaly
test-ambient: $(VENV)/dev.stamp ## the tests under states of torch that a user may set: default dtype, device, autocast
	for state in $(AMBIENT); do echo "== $$state"; FEDMAP_SPARSE_AMBIENT=$$state $(BIN)/python -m pytest -q \
	  --timeout 300 tests/ops tests/codec tests/federated tests/torch tests/test_*.py $(TEST_ARGS) || exit 1; done

test-gpu-free: $(VENV)/dev.stamp ## the checks of GPU code that need no GPU, whole; make test runs a selection
	FEDMAP_SPARSE_LADDER=whole $(BIN)/python -m pytest tests/gpu_free $(TEST_ARGS)

test-engines: $(VENV)/engines.stamp ## torch.distributed, Flower's processes on loopback, NVFlare's simulator: six minutes
	FEDMAP_SPARSE_ENGINES=1 $(BIN)/python -m pytest tests/engines --timeout 900 \
	  "tests/test_documents.py::test_code_blocks_run[docs/guides/nvflare.md]" $(TEST_ARGS)

test-crash: $(VENV)/dev.stamp ## kill, starve and interrupt CRASHES runs (50), and resume each to the same bits
	$(BIN)/python tests/experiments/crashes.py $(or $(CRASHES),50)

lint: $(VENV)/dev.stamp ## ruff, mypy, clang-format, typos, and what GitHub reads
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(wildcard csrc/*/*.cpp csrc/*/*.h csrc/cuda/*.cu tests/native/*/*.cpp tests/native/*/*.h tools/*.cpp)
	$(BIN)/typos
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(BIN)/check-jsonschema --builtin-schema vendor.github-issue-forms \
	  $(filter-out %/config.yml,$(wildcard .github/ISSUE_TEMPLATE/*.yml))
	$(BIN)/check-jsonschema --builtin-schema vendor.github-issue-config .github/ISSUE_TEMPLATE/config.yml
	$(BIN)/check-jsonschema --builtin-schema vendor.dependabot .github/dependabot.yml
	$(BIN)/zizmor --offline --quiet .github

docs: $(VENV)/dev.stamp ## the site, in build/docs; a warning or a broken link is an error
	$(BIN)/python -m sphinx --fail-on-warning --keep-going --quiet -b dirhtml docs build/docs

bench: $(VENV)/dev.stamp ## every kernel beside its peers and its floor, and a page of it: build/bench.html
	mkdir -p build
	$(BIN)/fedmap-sparse bench --html build/bench.html $(BENCH_ARGS)

.PHONY: count
count: ## instructions that six kernels execute beside benchmarks/instructions.csv; needs valgrind
	$(or $(PYTHON),python3) benchmarks/instructions.py $(COUNT_ARGS)

.PHONY: measure-gpu
measure-gpu: ## all measurements on a GPU, 8 minutes, with PYTHON or python3; MEASURE_ARGS=--dry-run
	$(or $(PYTHON),python3) tools/measure_gpu.py --out build/gpu-run $(MEASURE_ARGS)

vectors: $(VENV)/dev.stamp ## write the golden messages and op vectors that are missing; never changes one
	$(BIN)/python tests/vectors/make_vectors.py
	$(BIN)/python tests/vectors/op_vectors.py

sanitize: $(VENV)/dev.stamp ## the extension under ASan and UBSan through the tests, the pool under TSan
	PYTHON=$(BIN)/python tools/sanitize.sh

fuzz: $(VENV)/dev.stamp ## libFuzzer, ASan and UBSan on the message's decoders, FUZZ_SECONDS long (1800)
	PYTHON=$(BIN)/python fuzz/run.sh $(FUZZ_SECONDS)

fuzz-wire: $(VENV)/dev.stamp ## FUZZ_MESSAGES (1000000) damaged messages with good checksums, against the second reader
	$(BIN)/python fuzz/wire.py $(or $(FUZZ_MESSAGES),1000000) $(or $(FUZZ_SEED),0) $(shell nproc)

package: $(VENV)/dev.stamp ## sdist, wheel from it, and the wheel in a new environment without a compiler
	$(BIN)/python tools/check_package.py

clean: ## remove .venv and what builds left
	rm -rf $(VENV) build dist *.egg-info fedmap_sparse/_native*.so

$(VENV)/run.stamp: $(BUILD_INPUTS)
	tools/venv.sh $(VENV) experiments
	touch $@

$(VENV)/engines.stamp: $(VENV)/dev.stamp
	tools/venv.sh $(VENV) test,dev,engines
	touch $@

# The larger set of packages holds the smaller, so that `make run` after it has nothing to do.
$(VENV)/dev.stamp: $(BUILD_INPUTS)
	tools/venv.sh $(VENV) test,dev
	touch $@ $(VENV)/run.stamp
