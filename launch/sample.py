"""``flashtrain sample``: text from a checkpoint."""

import argparse
from pathlib import Path
from typing import Any

from flashtrain.errors import UserError
from flashtrain.launch import garbage


def add_parser(subparsers: Any) -> None:
    """Register the subcommand."""
    parser = subparsers.add_parser(
        "sample",
        help="continue a prompt with the model of a checkpoint",
        description="Print a prompt and what the model of a checkpoint makes of it, on this process alone.",
    )
    parser.add_argument(
        "checkpoint",
        type=Path,
        metavar="CHECKPOINT",
        help="a checkpoint, or the --out of a run: its last one",
    )
    parser.add_argument("--prompt", required=True, metavar="TEXT", help="text to continue")
    parser.add_argument(
        "--tokens", type=int, default=200, metavar="N", help="how many to draw (default: 200)"
    )
    parser.add_argument(
        "--temperature",
        type=float,
        default=0.7,
        metavar="T",
        help="0 takes the most likely token each time, 1 draws as the model says (default: 0.7)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="the same one draws the same (default: 0)"
    )
    parser.add_argument(
        "--share",
        type=int,
        metavar="N",
        help="let the last N of the model's layers that may share do so (default: as when it was saved)",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the prompt and what follows it."""
    with garbage.none_in_imports():
        from flashtrain.models.generate import generate
        from flashtrain.train import snapshot

    checkpoint = snapshot.find(args.checkpoint)
    model, config = snapshot.load_model(checkpoint)
    if args.share is not None:
        model.share(args.share)
    tokenizer = snapshot.load_tokenizer_of(checkpoint, config)
    try:
        prompt = tokenizer.encode(args.prompt)
    except UnicodeError:
        raise UserError("--prompt is no UTF-8: give text") from None
    tokens = generate(
        model,
        prompt,
        args.tokens,
        context=config["train"]["sequence"],
        temperature=args.temperature,
        seed=args.seed,
        vocabulary=tokenizer.vocab_size,
    )
    print(args.prompt + tokenizer.decode(tokens))
    return 0
