"""Run the recipe ``demo`` and keep its summary: ``python benchmarks/demo.py [--out benchmarks/results]``.

The run itself is what ``make demo`` does. The result names the machine and the versions.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import machine


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        words = ["-m", "flashtrain.launch.main", "train", "demo", "--out", folder]
        subprocess.run([sys.executable, *words], check=True)
        summary = json.loads(Path(folder, "summary.json").read_text())
    result = {"command": "make demo", "date": machine.date(), "machine": machine.facts()}
    result |= {"versions": machine.versions(), "summary": summary}
    path = args.out / "demo-cpu.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written: {path}")


if __name__ == "__main__":
    main()
