"""flashtrain: PyTorch training on decomposed peer-to-peer schedules (FlashOverlap, arXiv 2604.24013)."""

from pathlib import Path

__version__ = "0.1.0"

# kernels/ and launch/ stand beside this package and are linked into it. A checkout without symbolic
# links holds two text files instead; then the repository root serves as a second place to look.
if not (Path(__file__).parent / "launch").is_dir():
    __path__.append(str(Path(__file__).resolve().parent.parent))
