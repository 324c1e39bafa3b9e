"""Runs and inspects Triton kernels without a GPU. See README.md in this folder."""
