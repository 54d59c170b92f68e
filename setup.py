# SPDX-License-Identifier: Apache-2.0
"""Bridge from pip to CMakeLists.txt, which describes the build.

Environment variables:
    MAX_JOBS                 compilers run at a time (default: the processors)
    TORCH_CUDA_ARCH_LIST     such as "8.0;9.0;10.0+PTX"
    FORCE_CUDA=1 | 0         fail without nvcc | build no CUDA kernels
    DEBUG=1                  unoptimised, with debug symbols
    KDCI_SANITIZE            such as "address,undefined"
    KDCI_WERROR=1            warnings are errors
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def find_torch_include() -> Path | None:
    """Find the include folder of the user's PyTorch without importing it.

    pip builds in an isolated environment whose ``sys.path`` lacks the user's packages, but
    whose ``sysconfig`` still names the folder they are in.
    """
    folders = [Path(sysconfig.get_path(name), "torch") for name in ("purelib", "platlib")]
    spec = importlib.util.find_spec("torch")
    if spec is not None and spec.origin is not None:
        folders.insert(0, Path(spec.origin).parent)
    for folder in folders:
        if (folder / "include" / "torch" / "csrc" / "stable" / "library.h").exists():
            return folder / "include"
    return None


class CMakeBuild(build_ext):
    """Configures and builds with CMake and Ninja, in a folder that later builds reuse."""

    def build_extension(self, ext: Extension) -> None:
        """Build ``kdci_ext._C`` to where setuptools wants it."""
        include = find_torch_include()
        if include is None:
            sys.exit("kdci_ext needs PyTorch 2.10 or newer to build: pip install 'torch>=2.10'")
        import pybind11

        env = os.environ
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = ROOT / "build" / sys.implementation.cache_tag
        cuda = {"1": "ON", "0": "OFF"}.get(env.get("FORCE_CUDA", ""), "AUTO")
        options = {
            # An earlier build's isolated environment, and the ninja in it, may be gone.
            "CMAKE_MAKE_PROGRAM": shutil.which("ninja") or "ninja",
            "CMAKE_BUILD_TYPE": "Debug" if env.get("DEBUG") == "1" else "Release",
            "CMAKE_LIBRARY_OUTPUT_DIRECTORY": target.parent,
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
            "TORCH_INCLUDE_DIR": include,
            "KDCI_VERSION": self.distribution.get_version(),
            "KDCI_CUDA": cuda,
            "KDCI_SANITIZE": env.get("KDCI_SANITIZE", ""),
            "KDCI_WERROR": "ON" if env.get("KDCI_WERROR") == "1" else "OFF",
        }
        if "TORCH_CUDA_ARCH_LIST" in env:
            options["KDCI_CUDA_ARCHS"] = env["TORCH_CUDA_ARCH_LIST"]
        configure = ["cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja"]
        configure += [f"-D{name}={value}" for name, value in options.items()]
        jobs = env.get("MAX_JOBS", str(os.cpu_count() or 1))
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", str(build), "--target", "_C", "-j", jobs], check=True)


setup(
    ext_modules=[Extension("kdci_ext._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
    # Only where there is no PyTorch to build against may pip fetch one for the build: a
    # torch in build-system.requires would be a second download of several gigabytes.
    setup_requires=[] if find_torch_include() else ["torch>=2.10"],
)
