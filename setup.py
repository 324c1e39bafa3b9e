"""Builds the one C++ extension; everything else is declared in pyproject.toml."""

from glob import glob

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension
from setuptools import setup

# The ISA levels are target regions inside the sources, so there is no -march. Contraction is off
# because results have to be the same bits on every level and on every other backend.
ParallelCompile(default=0).install()
setup(
    ext_modules=[
        Pybind11Extension(
            "fedmap_sparse._native",
            sorted(glob("csrc/*/*.cpp")),
            depends=sorted(glob("csrc/*/*.h")),
            include_dirs=["csrc"],
            cxx_std=17,
            extra_compile_args=["-O3", "-ffp-contract=off", "-Wall", "-Wextra"],
        )
    ]
)
