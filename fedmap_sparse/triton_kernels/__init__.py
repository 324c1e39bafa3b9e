"""Triton kernels and their launchers, one file a stem. `fedmap_sparse.ops` holds the contracts.

Launchers call `_launch.launch`, not `kernel[grid]`: it spares most of Triton's time on the host.
"""
