"""The steps of `tools/measure_gpu.py`."""
