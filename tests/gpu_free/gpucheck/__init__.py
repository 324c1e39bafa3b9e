"""Tools that run and inspect Triton kernels without a GPU. See the README.md beside this folder."""
