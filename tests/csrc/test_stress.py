"""Compile csrc/tests/stress.cpp with the sanitizers and run it."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).resolve().parents[2] / "csrc"


# TSan for order between threads; ASan for memory that is touched after an abort or a shutdown.
@pytest.mark.parametrize("sanitizer", ["thread", "address"])
def test_rings_and_transports_under_sanitizers(sanitizer: str, tmp_path: Path) -> None:
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None and os.environ.get("FLASHTRAIN_REQUIRE_EXT", "0") in ("", "0"):
        pytest.skip("there is no C++ compiler")
    assert compiler is not None, "FLASHTRAIN_REQUIRE_EXT is set, but there is no C++ compiler"
    names = ("tests/stress", "courier", "link", "segment", "host_transport")
    sources = [CSRC / f"{name}.cpp" for name in names]
    program = tmp_path / "stress"
    # -Wno-tsan: TSan ignores stand-alone fences. Here they order only atomics (lost wake-ups); the bytes
    # are ordered by release and acquire, which it does follow.
    flags = ["-std=c++17", "-O1", "-g", "-Wall", "-Wextra", "-Werror", f"-fsanitize={sanitizer}", "-pthread"]
    if sanitizer == "thread" and "clang" not in Path(compiler).resolve().name:
        flags.append("-Wno-tsan")
    build = subprocess.run(
        [compiler, *flags, *map(str, sources), "-o", str(program)], capture_output=True, text=True
    )
    assert build.returncode == 0, build.stderr
    command = [str(program), "1"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120)
    if "unexpected memory mapping" in run.stderr:
        # TSan of older compilers cannot live with the randomness of newer kernels' address spaces.
        run = subprocess.run(["setarch", "-R", *command], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.count("transport:") == 3
