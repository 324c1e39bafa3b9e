#!/usr/bin/env bash
# Usage: tools/venv.sh DIR EXTRAS
# Makes the virtual environment DIR where it is missing and installs this project into it, editable,
# with EXTRAS, at the versions of constraints.txt. Reads PYTHON (an interpreter) and PIP_ARGS.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=$1 extras=$2

fail() {
  printf 'error: %s\n' "$@" >&2
  exit 1
}

install_hint='Debian, Ubuntu: sudo apt install g++ make python3-dev python3-venv
       Fedora: sudo dnf install gcc-c++ make python3-devel
       macOS: xcode-select --install, and Python from python.org'

recent() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

find_python() {
  local candidate
  for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11 python}; do
    if recent "$candidate"; then
      echo "$candidate"
      return
    fi
  done
  fail "no Python 3.11 or later found (looked for: ${PYTHON:-python3, python3.13, python3.12, python3.11, python})." \
    "Install one, or name it: make PYTHON=/path/to/python3.12 ..." "$install_hint"
}

if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
  python=$(find_python)
  "$python" -c 'import ensurepip, venv' 2>/dev/null ||
    fail "$python cannot make virtual environments: its venv module is missing." "$install_hint"
  "$python" -m venv "$venv"
fi
python=$venv/bin/python

# setuptools compiles with CC and CXX where they are set, else with the compiler that built Python.
header=$("$python" -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h
[ -f "$header" ] || fail "$header is missing: the headers of Python are needed to build the extension." "$install_hint"
compiler=${CXX:-$("$python" -c 'import sysconfig; print(sysconfig.get_config_var("CXX"))')}
echo 'int main() { return 0; }' | ${compiler} -std=c++17 -x c++ -fsyntax-only - 2>/dev/null ||
  fail "no C++17 compiler: '$compiler' does not run. Install one, or name it: CC=clang CXX=clang++ make ..." "$install_hint"

torch=$(sed -n 's/^torch==//p' constraints.txt)
if ! "$python" -c 'import importlib.metadata as m; m.version("torch")' 2>/dev/null; then
  cat <<MESSAGE
Installing torch $torch into $venv. On Linux the default build is the one for CUDA: 2.7 GB to download
with its libraries. A CPU build is 0.2 GB: to have that one, run make with
PIP_ARGS="--extra-index-url URL", URL being the CPU index that pytorch.org names under "Start Locally".
On macOS it is about 0.1 GB. With make test, Triton is 0.2 GB more on Linux.
MESSAGE
fi
quiet=--quiet
[ ! -t 1 ] || quiet=  # a person waits for gigabytes: show the progress
# shellcheck disable=SC2086  # PIP_ARGS is a list of arguments
"$python" -m pip install --disable-pip-version-check $quiet -c constraints.txt ${PIP_ARGS:-} -e ".[$extras]"
