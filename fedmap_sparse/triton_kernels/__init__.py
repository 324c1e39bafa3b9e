"""Triton kernels and their launchers, one file a stem. `fedmap_sparse.ops` holds the contracts."""
