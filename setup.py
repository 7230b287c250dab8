"""Builds the C kernels with whatever compiler is there. Without one the install succeeds, and torchdrop says so later.

The library is loaded by path and needs neither libtorch nor, at the least, Python's headers, so one wheel serves every
version of Python and torch on its platform.
"""

import itertools
import sys
import sysconfig
import tempfile
from pathlib import Path

from setuptools import Distribution, Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

SOURCES = Path("torchdrop/kernels/csrc")
FLAGS = ["-O3", "-g0", "-std=c11", "-ffp-contract=off", "-fno-math-errno", "-fvisibility=hidden"]


def attempts(compiler_type):
    """Compiler flags, linker flags and sources, the most complete first.

    OpenMP, the module for CPython and the vector kernels are each left out where the compiler cannot make them.
    """
    if compiler_type == "msvc":
        # Its OpenMP would be a second pool of threads beside that of PyTorch, in a library that a wheel has to bring.
        yield ["/std:c11"], [], [str(SOURCES / "dropout.c")], []
        return
    for plain, openmp, module in itertools.product((False, True), (True, False), (True, False)):
        if module and (sys.platform == "win32" or sysconfig.get_config_var("Py_GIL_DISABLED")):
            continue  # Python without its lock has no limited API
        compile_flags = FLAGS + ["-DTD_PLAIN"] * plain + ["-fopenmp"] * openmp
        link_flags = ["-fopenmp"] * openmp
        sources = [str(SOURCES / "dropout.c")] + [str(SOURCES / "module.c")] * module
        include = [sysconfig.get_paths()["include"]] * module
        yield compile_flags, link_flags, sources, include


class BuildKernels(build_ext):
    def get_ext_filename(self, fullname):
        return str(Path(*fullname.split("."))) + (".dll" if sys.platform == "win32" else ".so")

    def build_extension(self, ext):
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        for compile_flags, link_flags, sources, include in attempts(self.compiler.compiler_type):
            with tempfile.TemporaryDirectory() as scratch:
                try:
                    objects = self.compiler.compile(
                        sources, output_dir=scratch, include_dirs=include, extra_postargs=compile_flags
                    )
                    self.compiler.link_shared_object(
                        objects,
                        str(target),
                        libraries=[] if sys.platform == "win32" else ["m"],
                        export_symbols=[] if self.compiler.compiler_type == "msvc" else None,  # keeps _native.lib away
                        extra_postargs=link_flags + self._undefined(),
                    )
                except Exception as error:
                    self.warn(f"torchdrop: kernels not built with {' '.join(compile_flags)}: {error}")
                    continue
            self.announce(f"torchdrop: kernels built with {' '.join(compile_flags)} from {' '.join(sources)}", level=3)
            return
        self.warn("torchdrop: no C kernels were built; torchdrop will use PyTorch's own random numbers")

    def _undefined(self):
        return ["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else []


class AnyPython(bdist_wheel):
    """A wheel for this platform and any Python 3: the library has no version of Python in it."""

    def get_tag(self):
        return "py3", "none", super().get_tag()[2]


class Binary(Distribution):
    def has_ext_modules(self):
        return True


setup(
    ext_modules=[Extension("torchdrop.kernels._native", [str(SOURCES / "dropout.c")], optional=True)],
    cmdclass={"build_ext": BuildKernels, "bdist_wheel": AnyPython},
    distclass=Binary,
)
