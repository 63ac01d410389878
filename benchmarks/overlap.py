"""Is an overlapped product worth it? One run measures it against collectives around the plain product.

    python benchmarks/overlap.py --device cpu  [--world 2] [--repeats N] [--quick] [--out benchmarks/results]
    python benchmarks/overlap.py --device cuda [--world W] [--models 8B 70B] [--rows 2048 ...] [--sites ...]
                                 [--parts forward host backward dp graph] [--seconds BUDGET] [--out DIR]

Starts its own ranks on this machine, one a GPU with ``cuda``, prints a table and writes JSON. ``on_cpu.py``
and ``on_gpu/`` say what is measured and how; NOTES.md keeps what came out.
"""

import argparse
import sys

import on_cpu
from on_gpu import command

from flashtrain.errors import UserError


def main(arguments: list[str]) -> int:
    """Measure on the device asked for; the exit status."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    given, others = parser.parse_known_args(arguments)
    try:
        return (on_cpu if given.device == "cpu" else command).main(others)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
