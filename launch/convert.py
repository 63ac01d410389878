"""``flashtrain convert``: models from Hugging Face to checkpoints, and back."""

import argparse
import re
from pathlib import Path
from typing import Any

from flashtrain.errors import UserError
from flashtrain.launch import garbage

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}


def add_parser(subparsers: Any) -> None:
    """Register the subcommand."""
    parser = subparsers.add_parser(
        "convert",
        help="convert models from and to Hugging Face",
        usage="flashtrain convert {hf2ft,ft2hf} SOURCE OUT [options]",
        description=(
            "hf2ft makes OUT a checkpoint from SOURCE, a local Hugging Face folder with config.json and "
            "safetensors (Llama, Mistral, Qwen2). ft2hf makes OUT a folder that transformers loads from "
            "SOURCE, a checkpoint or the --out of a run. The tokenizer's files and config.json travel "
            "along. OUT must not exist, and appears when it is whole."
        ),
        epilog=(
            "flashtrain train continue-pretraining --train.init_from OUT goes on with a converted model, "
            "with any parallel degrees that divide it."
        ),
    )
    parser.add_argument("direction", choices=("hf2ft", "ft2hf"), help="from Hugging Face, or to it")
    parser.add_argument("source", type=Path, metavar="SOURCE", help="what to convert; it is only read")
    parser.add_argument("out", type=Path, metavar="OUT", help="the folder to make")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="round all weights (default: as they are)"
    )
    parser.add_argument(
        "--file-size",
        default="2GB",
        metavar="SIZE",
        help="of each file of weights, such as 500MB; memory stays near it (default: 2GB)",
    )
    parser.add_argument(
        "--tokenizer",
        type=Path,
        metavar="PATH",
        help="ft2hf: a tokenizer.json or a tokenizer's folder, instead of the one that came with the weights",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Convert, naming each file when it is written."""
    size = _bytes(args.file_size)
    if args.tokenizer is not None and args.direction == "hf2ft":
        raise UserError("--tokenizer is for ft2hf: hf2ft carries the files in SOURCE along")
    with garbage.none_in_imports():
        from flashtrain.train import convert

    settings: dict[str, Any] = {"dtype": args.dtype, "file_bytes": size, "on_file": print}
    if args.direction == "hf2ft":
        done = convert.from_hf(args.source, args.out, **settings)
    else:
        done = convert.to_hf(args.source, args.out, tokenizer=args.tokenizer, **settings)
    print(
        f"{args.out}: {done.parameters / 1e6:,.2f} M parameters in {done.dtype}; "
        f"came along: {', '.join(done.carried) or 'no tokenizer'}"
    )
    return 0


def _bytes(text: str) -> int:
    """A size in bytes. Raises UserError if it is none."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMG]i?B)?", text)
    if found is None or (size := int(float(found[1]) * _UNITS[found[2] or ""])) < 1:
        raise UserError(f"--file-size is {text}; expected a size such as 500MB or 5GB")
    return size
