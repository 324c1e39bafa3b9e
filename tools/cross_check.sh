#!/usr/bin/env bash
# The self-check of the kernels for other processors, cross-compiled and run under QEMU:
#   tools/cross_check.sh [aarch64] [armhf] [riscv64]     default: all three
# Needs no Python. Says which packages are missing, by their names in Debian and Ubuntu.
set -euo pipefail
cd "$(dirname "$0")/.."

# Short runs where only libc differs from the run before: its copies use SVE.
aarch64=("cortex-a53" "max" "max,sve128=on --short" "max,sve256=on --short")
armhf=("max")
riscv64=("rv64")

runs=()
for target in "${@:-aarch64 armhf riscv64}"; do
    for one in $target; do
        compiler=g++ flags="-O1 -Wall -Wextra -Werror"
        case $one in
        aarch64) triple=aarch64-linux-gnu emulator=qemu-aarch64 libc=libc6-arm64-cross
            flags="-O3 -Wall -Wextra -Werror" ;; # as the package, and as count.py
        armhf) triple=arm-linux-gnueabihf emulator=qemu-arm libc=libc6-armhf-cross
            flags+=" -Wno-psabi" ;; # GCC 7 changed how some arguments are passed
        riscv64) triple=riscv64-linux-gnu emulator=qemu-riscv64 libc=libc6-riscv64-cross ;;
        *) echo "cross_check: expected aarch64, armhf or riscv64, got '$one'"; exit 2 ;;
        esac
        compiler=$triple-g++ missing=()
        command -v "$compiler" >/dev/null || missing+=("g++-$triple")
        command -v $emulator >/dev/null || missing+=(qemu-user)
        [ -e /usr/$triple/lib/libc.so.6 ] || missing+=($libc)
        if [ ${#missing[@]} -gt 0 ]; then
            echo "cross_check: $one: missing packages: ${missing[*]}"
            exit 1
        fi
        out=$PWD/build/selfcheck/$triple
        make -s -C tests/native/selfcheck -j"$(nproc)" CXX="$compiler" OUT="$out" CXXFLAGS="$flags" \
            LDFLAGS=-latomic # 64-bit atomics of 32-bit processors, bytes' of RISC-V
        declare -n cpus=$one
        for cpu in "${cpus[@]}"; do
            runs+=("$emulator -L /usr/$triple -cpu ${cpu%% *} $out/selfcheck${cpu#"${cpu%% *}"}")
        done
    done
done

# One run for each core at a time; what a run said comes whole, at its end.
printf '%s\n' "${runs[@]}" | xargs -P "$(nproc)" -I RUN bash -c '
    TIMEFORMAT="%U s of a core"
    status=0
    said=$( { time RUN; } 2>&1 ) || status=$?
    printf "== %s\n%s\n" "RUN" "$said"
    exit $status'
