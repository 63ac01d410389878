"""Preparing data beside Megatron's way: ``python benchmarks/data_prepare.py --input FILE.jsonl``.

B is what Megatron-LM's tools/preprocess_data.py does with ``--append-eod`` and a Hugging Face tokenizer: a
pool of processes maps an encoder over the lines in order (``Pool.imap``, chunks of 32 lines), and the parent
gives each document to megatron-core's IndexedDatasetBuilder. The script is not in megatron-core's wheel, so
its way is written down here. A is ``flashtrain data prepare``'s function. Both take the same file, the same
tokenizer.json and the same number of processes, turn by turn, each in a fresh process; both write to the
same disk, A durably. The results must be the same tokens.
"""

import argparse
import json
import multiprocessing
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path

import machine

CHUNK = 32  # lines a task, as preprocess_data.py has it


def _start_megatron(tokenizer: str) -> None:
    global _tokenizer
    import tokenizers

    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _tokenizer = tokenizers.Tokenizer.from_file(tokenizer)
    _tokenizer.encode_special_tokens = True


def _encode(line: str) -> tuple[list[int], int]:
    text = json.loads(line)["text"]
    ids = _tokenizer.encode(text, add_special_tokens=False).ids
    if ids:
        ids.append(0)
    return ids, len(line)


def megatron(source: Path, tokenizer: Path, out: Path, workers: int) -> None:
    """Megatron's way."""
    import warnings

    warnings.simplefilter("ignore")
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(
        f"{out / 'tokens'}.bin", dtype=DType.optimal_dtype(_vocabulary(tokenizer))
    )
    pool = multiprocessing.Pool(workers, initializer=_start_megatron, initargs=(str(tokenizer),))
    with source.open(encoding="utf-8") as stream, pool:
        for ids, _ in pool.imap(_encode, stream, CHUNK):
            if ids:
                builder.add_document(ids, [len(ids)])
    builder.finalize(f"{out / 'tokens'}.idx")


def ours(source: Path, tokenizer: Path, out: Path, workers: int) -> None:
    """flashtrain's way."""
    from flashtrain.data.prepare import prepare

    prepare([str(source)], out, str(tokenizer), boundary="<|endoftext|>", workers=workers)


def _vocabulary(tokenizer: Path) -> int:
    import tokenizers

    return tokenizers.Tokenizer.from_file(str(tokenizer)).get_vocab_size()


def _run(who: str, source: Path, tokenizer: Path, out: Path, workers: int) -> dict[str, float]:
    """Seconds of a fresh process, its start and imports included, and the processor time of all its own."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    command = [sys.executable, __file__, "--one", who, "--input", str(source), "--tokenizer", str(tokenizer)]
    before, started = os.times(), time.perf_counter()
    subprocess.run([*command, "--work", str(out), "--workers", str(workers)], check=True)
    seconds, after = time.perf_counter() - started, os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return {"seconds": seconds, "cpu_seconds": cpu}


def _compare(source: Path, tokenizer: Path, workers: int, repeats: int) -> dict:
    rows: dict[str, list[dict[str, float]]] = {"flashtrain": [], "megatron": []}
    shares = []
    with tempfile.TemporaryDirectory() as folder:
        outs = {name: Path(folder, name) for name in rows}
        one = Path(folder, "one.jsonl")
        with source.open(encoding="utf-8") as stream:
            one.write_text(stream.readline(), encoding="utf-8")
        start = {name: _run(name, one, tokenizer, outs[name], workers) for name in rows}
        for repeat in range(repeats + 1):
            others, spent = machine.Others(), 0.0
            for name in rows:
                measured = _run(name, source, tokenizer, outs[name], workers)
                spent += measured["cpu_seconds"]
                if repeat:  # the first fills the page cache
                    rows[name].append(measured)
            shares.append(round(others.share(spent), 3))
        for suffix in (".bin", ".idx"):
            a, b = (Path(out, "tokens").with_suffix(suffix).read_bytes() for out in outs.values())
            if a != b:
                raise SystemExit(f"the two wrote different tokens{suffix}")
    pairs = list(zip(rows["flashtrain"], rows["megatron"], strict=True))
    ratios = {
        kind: statistics.median(theirs[kind] / mine[kind] for mine, theirs in pairs)
        for kind in ("seconds", "cpu_seconds")
    }
    size = source.stat().st_size
    medians = {
        name: {kind: statistics.median(row[kind] for row in found) for kind in ("seconds", "cpu_seconds")}
        for name, found in rows.items()
    }
    return {
        "workers": workers,
        "repeats": repeats,
        "start": start,  # the same on the first line alone: imports, processes, loading the tokenizer
        "median": medians,
        "megabytes_per_s": {name: size / 1e6 / medians[name]["seconds"] for name in medians},
        "megatron_over_flashtrain": ratios,
        "rows": rows,
        "share_of_cores_used_by_others": shares[1:],
        "same_bytes": True,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--input", type=Path, required=True, help="JSON lines with a field text")
    parser.add_argument(
        "--tokenizer", type=Path, required=True, help="a tokenizer.json whose id 0 ends documents"
    )
    parser.add_argument("--workers", type=int, default=machine.cores())
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--one", choices=["flashtrain", "megatron"], help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        way = ours if args.one == "flashtrain" else megatron
        way(args.input, args.tokenizer, args.work, args.workers)
        return
    result = {
        "command": "python benchmarks/data_prepare.py",
        "date": machine.date(),
        "machine": machine.facts(),
        "versions": {"python": platform.python_version()}
        | {name: metadata.version(name) for name in ("flashtrain", "megatron-core", "tokenizers", "numpy")},
        "input_bytes": args.input.stat().st_size,
        "vocabulary": _vocabulary(args.tokenizer),
        "measured": [
            _compare(args.input, args.tokenizer, workers, args.repeats)
            for workers in sorted({1, args.workers})
        ],
    }
    path = args.out / "data-prepare-cpu.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps([{k: v for k, v in row.items() if k != "rows"} for row in result["measured"]], indent=1))
    print(f"written: {path}")


if __name__ == "__main__":
    main()
