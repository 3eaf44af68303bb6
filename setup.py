"""The compiled kernels for CPUs; everything else is in pyproject.toml."""

import platform

from setuptools import Extension, setup

# Where there is no C compiler, or one that does not know these, the loss is left to plain torch: `optional`. Nothing is
# linked for OpenMP, whose functions come from the library that torch has loaded, so that both share their threads.
kernels = Extension(
    "sdft_kernels._cpu_kernels",
    sources=["sdft_kernels/cpu_kernels.c"],
    depends=["sdft_kernels/cpu_products.h"],
    extra_compile_args=[
        *("-O3", "-fopenmp", "-fno-math-errno", "-fno-trapping-math"),
        *(["-mprefer-vector-width=512"] if platform.machine() == "x86_64" else []),
    ],
    optional=True,
)

setup(ext_modules=[kernels])
