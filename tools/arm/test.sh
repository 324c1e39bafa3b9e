#!/usr/bin/env bash
# The self-check of the kernels for 64-bit ARM, cross-compiled and run under QEMU:
#   tools/arm/test.sh [CPU ...]     default: cortex-a53 (ARMv8.0) and max (all that QEMU knows)
# Needs no Python. Says which packages are missing; with IF_PRESENT=1 that is no failure.
set -euo pipefail
cd "$(dirname "$0")/../.."

missing=()
command -v aarch64-linux-gnu-g++ >/dev/null || missing+=(g++-aarch64-linux-gnu)
command -v qemu-aarch64 >/dev/null || missing+=(qemu-user)
[ -e /usr/aarch64-linux-gnu/lib/libc.so.6 ] || missing+=(libc6-arm64-cross)
if [ ${#missing[@]} -gt 0 ]; then
    echo "test-arm: not run; missing packages (names of Debian and Ubuntu): ${missing[*]}"
    exit "$([ "${IF_PRESENT:-0}" = 1 ] && echo 0 || echo 1)"
fi

out=$PWD/build/selfcheck/aarch64-linux-gnu
make -s -C tests/native/selfcheck -j"$(nproc)" CXX=aarch64-linux-gnu-g++ OUT="$out"
for cpu in "${@:-cortex-a53 max}"; do
    for one in $cpu; do
        echo "== -cpu $one"
        qemu-aarch64 -L /usr/aarch64-linux-gnu -cpu "$one" "$out/selfcheck"
    done
done
