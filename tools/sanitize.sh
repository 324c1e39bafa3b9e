#!/usr/bin/env bash
# The extension under AddressSanitizer and UndefinedBehaviorSanitizer through the tests of the
# native layer, and the thread pool under ThreadSanitizer through tools/pool_stress.cpp.
#
#   PYTHON=.venv/bin/python tools/sanitize.sh [pytest arguments: instead of the native tests]
set -euo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python3}
cxx=${CXX:-g++}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

echo "== ThreadSanitizer: the pool"
"$cxx" -std=c++17 -O1 -g -fsanitize=thread -Wall -Wextra -Icsrc -pthread \
    tools/pool_stress.cpp csrc/core/pool.cpp -o "$work/pool_stress"
TSAN_OPTIONS="halt_on_error=1" "$work/pool_stress"

echo "== AddressSanitizer and UndefinedBehaviorSanitizer: the extension"
# A copy of the package beside the instrumented extension: the tree keeps the one it has.
cp -r fedmap_sparse "$work/fedmap_sparse"
rm -f "$work"/fedmap_sparse/_native*.so
CXX=$cxx CC=$cxx \
    CFLAGS="-O1 -g -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=undefined" \
    LDFLAGS="-fsanitize=address,undefined" \
    "$python" setup.py -q build_ext --force --build-lib "$work" --build-temp "$work/objects"

tests=("$@")
if [ ${#tests[@]} -eq 0 ]; then
    tests=(tests/native tests/ops tests/test_mask.py tests/test_layout.py tests/test_optim.py
        tests/test_optim_state.py)
fi
# Leaks are not looked for: the interpreter and torch keep memory to the end. What measures memory
# or looks at the machine code would see the sanitizer's own.
export LD_PRELOAD="$("$cxx" -print-file-name=libasan.so) $("$cxx" -print-file-name=libubsan.so)"
export ASAN_OPTIONS="detect_leaks=0:allocator_may_return_null=1"
export UBSAN_OPTIONS="print_stacktrace=1"
export PYTHONPATH=$work PYTHONSAFEPATH=1
"$python" -c 'import sys; from fedmap_sparse import _native; assert sys.argv[1] in _native.__file__' \
    "$work"
"$python" -m pytest -q -p no:cacheprovider --rootdir "$PWD" -c pyproject.toml \
    -k "not peak_memory and not compiled_for_its_registers" "${tests[@]}"
