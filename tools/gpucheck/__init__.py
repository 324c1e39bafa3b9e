"""Tools that run and inspect Triton kernels without a GPU. See the README.md beside this folder."""

import os

#: `make test-gpu-free` sets it: every case on every rung. By default a selection.
WHOLE = os.environ.get("FEDMAP_SPARSE_LADDER") == "whole"
