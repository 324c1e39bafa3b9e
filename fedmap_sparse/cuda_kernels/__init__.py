"""CUDA C++ kernels, compiled by NVRTC at first use; one module per stem, sources in csrc/cuda.

What they need is in a CUDA build of torch: libnvrtc, and the driver's libcuda. Neither nvcc nor a
CUDA build step is needed.
"""
