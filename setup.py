"""Builds the one C++ extension; everything else is declared in pyproject.toml."""

from glob import glob
from pathlib import Path

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension
from setuptools import setup
from setuptools.command.build_py import build_py


class WithSources(build_py):
    """CUDA C++ is compiled by NVRTC where it runs, so its sources are a part of the package."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:  # then the tree has them
            for path in sorted(glob("csrc/cuda/*")):
                self.copy_file(path, str(Path(self.build_lib, "fedmap_sparse", "cuda_kernels")))


# The ISA levels are target regions inside the sources, so there is no -march. Contraction is off
# because results have to be the same bits on every level and on every other backend.
ParallelCompile(default=0).install()
setup(
    cmdclass={"build_py": WithSources},
    ext_modules=[
        Pybind11Extension(
            "fedmap_sparse._native",
            sorted(glob("csrc/*/*.cpp")),
            depends=sorted(glob("csrc/*/*.h")),
            include_dirs=["csrc"],
            cxx_std=17,
            extra_compile_args=["-O3", "-ffp-contract=off", "-Wall", "-Wextra"],
        )
    ],
)
