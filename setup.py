"""Builds the CPU kernels when a C++ compiler is there; everything else about the package is in pyproject.toml.

The library is loaded through ctypes, so it needs neither Python's nor torch's headers. Its kernels are compiled once
per instruction set and chosen at run time: the result runs on any machine of its architecture. Without a compiler, or
if it fails, installation goes on and torch does the work (``python -m pomona.kernels.cpu.binding`` says which it is).
"""

import itertools
import os
import platform
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

NATIVE = "src/pomona/kernels/cpu/native"
HEADERS = sorted(path.as_posix() for path in Path(NATIVE).glob("*.h"))
FLAGS = ["-O3", "-g0", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno"]
# gcc 12 takes its own intrinsics' undefined lanes for mistakes of ours.
FLAGS += ["-Wall", "-Wno-psabi", "-Wno-ignored-attributes", "-Wno-uninitialized", "-Wno-maybe-uninitialized"]
AVX2 = ["-mavx2", "-mfma"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
ISAS = {"plain": []}
if platform.machine().lower() in ("x86_64", "amd64"):
    ISAS |= {"avx2": AVX2, "avx512": AVX512, "avx512bf16": [*AVX512, "-mavx512bf16", "-mavx512vnni"]}
    ISAS["amx"] = [*ISAS["avx512bf16"], "-mamx-tile", "-mamx-bf16", "-mamx-int8"]
OPTIONAL = {"amx": "POMONA_AMX"}
"""What older compilers cannot compile: the others are told by a macro that it is there."""


class BuildKernels(build_ext):
    """Compile isa.cpp once per instruction set, the rest once, and link them into one library."""

    def build_extension(self, ext: Extension) -> None:
        """Build, or say in one line why not."""
        if sys.platform == "win32":
            return self._give_up("not supported on Windows")
        try:
            self._build(ext)
        except Exception as error:  # noqa: BLE001 (a compiler can fail in any way; none of them may fail the installation)
            return self._give_up(f"{type(error).__name__}: {error}")
        return None

    def _give_up(self, reason: str) -> None:
        sys.stderr.write(f"pomona: CPU kernels not built, torch will do their work ({reason})\n")

    def _build(self, ext: Extension) -> None:
        common = {"output_dir": self.build_temp, "extra_postargs": FLAGS, "depends": ext.depends}
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            of_isas = dict(zip(ISAS, pool.map(lambda name: self._compile_isa(name, ext), ISAS), strict=True))
        missing = [name for name, made in of_isas.items() if not made]
        if missing:
            sys.stderr.write(f"pomona: this compiler cannot make the kernels for {missing}; going on without them\n")
        macros = [(macro, None) for name, macro in OPTIONAL.items() if of_isas.get(name)]
        sources = [f"{NATIVE}/api.cpp", f"{NATIVE}/threads.cpp"]
        objects = self.compiler.compile(sources, macros=macros, **common)
        objects += itertools.chain.from_iterable(of_isas.values())
        path = self.get_ext_fullpath(ext.name)
        self.mkpath(os.path.dirname(path))
        self.compiler.link_shared_object(objects, path, target_lang="c++")

    def _compile_isa(self, name: str, ext: Extension) -> list[str]:
        """The objects of an instruction set; none if it is optional and the compiler cannot make them."""
        try:
            objects: list[str] = self.compiler.compile(
                [f"{NATIVE}/isa.cpp"],
                output_dir=os.path.join(self.build_temp, name),
                macros=[("POMONA_KERNELS", f"kernels_{name}")],
                extra_postargs=[*FLAGS, *ISAS[name]],
                depends=ext.depends,
            )
        except CompileError:
            if name not in OPTIONAL:
                raise
            return []
        return objects

    def get_outputs(self) -> list[str]:
        """Only what was really built."""
        return [path for path in super().get_outputs() if os.path.exists(path)]

    def copy_extensions_to_source(self) -> None:
        """For editable installs; nothing to copy if nothing was built."""
        if os.path.exists(os.path.join(self.build_lib, self.get_ext_filename("pomona.kernels.cpu._native"))):
            super().copy_extensions_to_source()


setup(
    ext_modules=[
        Extension(
            "pomona.kernels.cpu._native",
            sources=[f"{NATIVE}/api.cpp", f"{NATIVE}/threads.cpp", f"{NATIVE}/isa.cpp"],
            depends=HEADERS,
            language="c++",
        )
    ],
    cmdclass={"build_ext": BuildKernels},
)
