"""Install flashtrain and build its C++ extension ``flashtrain._core`` with CMake.

Without a compiler the package installs and works without the extension, through slower transports.
FLASHTRAIN_REQUIRE_EXT=1 makes a failed build an error instead.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_namespace_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
REQUIRED = os.environ.get("FLASHTRAIN_REQUIRE_EXT", "0") not in ("", "0")


class CMakeBuild(build_ext):
    """Configure and build with CMake; put the module where setuptools expects it."""

    def build_extension(self, ext: Extension) -> None:
        module = Path(self.get_ext_fullpath(ext.name)).resolve()
        try:
            self._cmake(module)
        except (OSError, RuntimeError, ImportError, subprocess.CalledProcessError) as error:
            if REQUIRED:
                raise RuntimeError(
                    f"building {ext.name} failed ({error}); unset FLASHTRAIN_REQUIRE_EXT to do without"
                ) from error
            # A module of an earlier build would be taken for one of these sources.
            for folder in {module.parent, ROOT / "flashtrain"}:
                (folder / module.name).unlink(missing_ok=True)
            print(
                f"\nWARNING: building {ext.name} failed ({error}).\n"
                "WARNING: flashtrain is installed WITHOUT its C++ extension; ranks will talk through "
                "torch.distributed, which is slower.\n"
                "WARNING: install a C++17 compiler and install again; FLASHTRAIN_REQUIRE_EXT=1 turns this "
                "warning into an error.\n",
                file=sys.stderr,
                flush=True,
            )

    def _cmake(self, module: Path) -> None:
        cmake = shutil.which("cmake")
        if cmake is None:
            raise RuntimeError("cmake was not found")
        import pybind11

        build = Path(self.build_temp).resolve() / "core"
        # A cache written with another interpreter or from another folder would be silently reused.
        shutil.rmtree(build, ignore_errors=True)
        build.mkdir(parents=True)
        configure = [
            cmake, "-S", str(ROOT), "-B", str(build),
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={module.parent}",
        ]  # fmt: skip
        if shutil.which("ninja"):
            configure += ["-G", "Ninja"]
        module.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run(configure, check=True)
        subprocess.run([cmake, "--build", str(build), "--parallel"], check=True)
        if not module.exists():
            raise RuntimeError(f"CMake did not make {module.name}")


def version() -> str:
    """The version that ``flashtrain/__init__.py`` states; importing it here would need torch."""
    text = (ROOT / "flashtrain" / "__init__.py").read_text(encoding="utf-8")
    found = re.search(r'^__version__ = "([^"]+)"$', text, re.MULTILINE)
    if found is None:
        raise RuntimeError("flashtrain/__init__.py states no __version__")
    return found.group(1)


# Preparing data, and training on it with a tokenizer other than bytes.
DATA = ["tokenizers>=0.21", "zstandard", "pyarrow"]

setup(
    name="flashtrain",
    version=version(),
    description="PyTorch training on decomposed peer-to-peer schedules",
    python_requires=">=3.11",
    # kernels/ and launch/ are links without __init__.py, hence namespaces.
    packages=find_namespace_packages(include=["flashtrain", "flashtrain.*"]),
    package_data={"flashtrain.metrics.page": ["page.html", "page.css", "page.js"]},
    # optional: an editable install must not stop at a module that was not built.
    # depends: source distributions take the files along.
    ext_modules=[
        Extension(
            "flashtrain._core",
            sources=[],
            depends=[
                "CMakeLists.txt",
                *(str(path.relative_to(ROOT)) for path in sorted(ROOT.glob("csrc/**/*.*"))),
            ],
            optional=not REQUIRED,
        )
    ],
    cmdclass={"build_ext": CMakeBuild},
    install_requires=[
        "torch>=2.11",
        "numpy",
        "rich",
        "tyro",
        "tomli-w",
        "safetensors",
        "fsspec",
        "tensorboard",
        "matplotlib",
        "jinja2",
        "packaging",
    ],
    extras_require={
        "data": DATA,
        # To load what ``flashtrain convert ft2hf`` writes; converting itself needs safetensors alone.
        "hf": ["transformers>=4.51", "tokenizers"],
        "wandb": ["wandb>=0.20"],
        "prometheus": ["prometheus-client>=0.19"],
        "nvml": ["nvidia-ml-py>=12.535"],
        "dev": [
            *DATA,
            # What it writes is read here and the other way round; transformers loads our tokenizers.
            "megatron-core>=0.16",
            "pytest",
            "hypothesis",
            "psutil",
            "ruff",
            "mypy",
            "pre-commit",
            "transformers>=4.51",
            "tokenizers",
            "wandb>=0.20",
            "prometheus-client>=0.19",
            "nvidia-ml-py>=12.535",  # its names are compared with the stand-in of the tests
            # Two hosts on one machine, for the tests of runs over a network.
            "pyroute2; platform_system == 'Linux'",
            # CPU builds of torch come without it; the kernels are tested in its interpreter.
            "triton>=3.6; platform_system == 'Linux'",
        ],
    },
    entry_points={"console_scripts": ["flashtrain = flashtrain.launch.main:program"]},
    zip_safe=False,
)
