#!/usr/bin/env bash
# Fuzzes the decoders of the entropy coder: fuzz/run.sh SECONDS. Needs clang++ with libFuzzer; PYTHON
# has the package installed and writes the seeds. What widens the coverage stays in build/fuzz/corpus;
# fuzz/corpus holds the small inputs of earlier runs.
set -euo pipefail
cd "$(dirname "$0")/.."
command -v clang++ >/dev/null || { echo "fuzz: clang++ was not found; install clang (Debian: clang)"; exit 1; }
mkdir -p build/fuzz/corpus build/fuzz/seeds
"${PYTHON:-python3}" fuzz/seeds.py build/fuzz/seeds
sources=$(find csrc -name '*.cpp' ! -path 'csrc/bindings/*')
# shellcheck disable=SC2086  # a list of files
clang++ -std=c++17 -O1 -g -ffp-contract=off -Wall -Wextra -Icsrc -pthread \
  -fsanitize=fuzzer,address,undefined -fno-sanitize-recover=all \
  fuzz/entropy_fuzz.cpp $sources -o build/fuzz/entropy_fuzz
exec build/fuzz/entropy_fuzz -max_total_time="${1:-1800}" -max_len=60000 -timeout=20 \
  -rss_limit_mb=2048 -print_final_stats=1 -artifact_prefix=build/fuzz/ \
  build/fuzz/corpus fuzz/corpus build/fuzz/seeds
