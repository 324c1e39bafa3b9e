#!/usr/bin/env bash
# Compiles csrc for aarch64, which has the scalar level alone, with Debian's cross compiler
# (package g++-aarch64-linux-gnu). All but module.cpp, which needs that platform's Python headers.
set -euo pipefail
cd "$(dirname "$0")/.."

cxx=aarch64-linux-gnu-g++
if ! command -v "$cxx" >/dev/null; then
    echo "skipped: $cxx is missing (Debian: apt-get install g++-aarch64-linux-gnu)"
    exit 0
fi

objects=$(mktemp -d)
trap 'rm -r "$objects"' EXIT
export cxx objects
find csrc -name '*.cpp' ! -path 'csrc/bindings/*' -print0 | xargs -0 -P "$(nproc)" -I{} sh -c '
    "$cxx" -std=c++17 -O2 -ffp-contract=off -fPIC -pthread -Wall -Wextra -Icsrc -Werror \
        -c "$1" -o "$objects/$(basename "$1").o"' sh {}
"$cxx" -shared -pthread -Wl,--no-undefined "$objects"/*.o -o "$objects/kernels.so"
echo "compiled $(find "$objects" -name '*.o' | wc -l) files and linked them for aarch64"
