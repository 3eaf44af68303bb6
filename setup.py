"""The compiled kernels for CPUs; everything else is in pyproject.toml."""

import os
import platform

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

# Where there is no C compiler, or one that does not know these, the loss is left to plain torch: `optional`. Nothing is
# linked for OpenMP, whose functions come from the library that torch has loaded, so that both share their threads.
kernels = Extension(
    "sdft_kernels.backends.cpu._kernels",
    sources=["sdft_kernels/backends/cpu/kernels.c"],
    depends=["sdft_kernels/backends/cpu/products.h"],
    extra_compile_args=[
        *("-O3", "-fopenmp", "-fno-math-errno", "-fno-trapping-math"),
        *(["-mprefer-vector-width=512"] if platform.machine() == "x86_64" else []),
    ],
    optional=True,
)


class WholeLibraries(build_ext):
    """Puts a library beside the sources in one move: whoever loads it meanwhile has the old one or the new one."""

    def copy_file(self, infile, outfile, *args, **options):
        aside = f"{outfile}.new"
        super().copy_file(infile, aside, *args, **options)
        os.replace(aside, outfile)
        return outfile, 1


setup(ext_modules=[kernels], cmdclass={"build_ext": WholeLibraries})
