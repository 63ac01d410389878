"""What a finished run shows: its loss beside a yardstick, a sample, its files, and what to type next."""

import json
import os
import shutil
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from flashtrain.errors import UserError
from flashtrain.metrics import StepMetrics
from flashtrain.models.generate import generate
from flashtrain.train import snapshot

PROMPT = "def "
SAMPLE_TOKENS = 240


@dataclass(frozen=True)
class Summary:
    """``held_out`` and ``unigram_entropy`` in nats per token; ``measured`` are the steps of this start."""

    out: Path
    checkpoint: Path
    held_out: float
    unigram_entropy: float
    measured: list[StepMetrics]

    def show(self) -> None:
        """Print it and write summary.json. For one process, after the ranks have parted; loads the model."""
        summary = self.out / "summary.json"
        if self.measured or not summary.exists():  # a finished run that is started again has none to add
            summary.write_text(json.dumps(self.figures(), indent=2) + "\n")
        console = Console(highlight=False)
        figures = Table.grid(padding=(0, 2))
        for name, value in self._lines():
            figures.add_row(name, value)
        console.print(figures)
        console.print(Panel(Text(self._sample()), title=f"a sample, after {PROMPT!r}", title_align="left"))
        paths = Table.grid(padding=(0, 2))
        for name, path in self._paths():
            paths.add_row(name, str(path))
        console.print(paths)
        console.print("\nNext:")
        for command in self._commands():
            console.print(f"  {command}", soft_wrap=True)

    def figures(self) -> dict[str, float | int | None]:
        """Losses in nats per token, seconds of all steps, and medians over all steps but the first tenth."""
        # The first steps allocate and fill caches.
        steady = self.measured[len(self.measured) // 10 :]
        hidden = [m.overlap for m in steady if m.overlap is not None]
        return {
            "held_out_loss": self.held_out,
            "unigram_entropy": self.unigram_entropy,
            "steps": len(self.measured),
            "seconds": sum(m.step_s for m in self.measured),
            "tokens_per_s": statistics.median(m.tokens_per_s for m in steady) if steady else None,
            "overlap": statistics.median(hidden) if hidden else None,
            "overhead": statistics.median(m.overhead for m in steady) if steady else None,
        }

    def _lines(self) -> list[tuple[str, str]]:
        figures = self.figures()
        lines = [
            ("held-out loss", f"{self.held_out:.4f} nats per token"),
            ("unigram entropy", f"{self.unigram_entropy:.4f} nats per token of the same text"),
        ]
        if self.measured:
            hidden = figures["overlap"]
            lines += [
                ("training time", f"{figures['seconds']:.0f} s for {figures['steps']} steps"),
                ("tokens per second", f"{figures['tokens_per_s']:,.0f}"),
                ("communication hidden", "n/a" if hidden is None else f"{hidden:.1%}"),
                ("step's own overhead", f"{figures['overhead']:.1%} of a step is not model arithmetic"),
            ]
        return lines

    def _sample(self) -> str:
        model, config = snapshot.load_model(self.checkpoint)
        tokenizer = snapshot.load_tokenizer_of(self.checkpoint, config)
        prompt = tokenizer.encode(PROMPT)
        context = config["train"]["sequence"]
        try:
            tokens = generate(
                model,
                prompt,
                SAMPLE_TOKENS,
                context=context,
                temperature=0.7,
                seed=0,
                vocabulary=tokenizer.vocab_size,
            )
        except UserError as error:  # a trained model is no failure because it cannot decode
            return f"none: {error}"
        return PROMPT + tokenizer.decode(tokens)

    def _paths(self) -> list[tuple[str, Path]]:
        return [
            ("loss curve", self.out / "loss.png"),
            ("metrics", self.out / "metrics.jsonl"),
            ("summary", self.out / "summary.json"),
            ("TensorBoard", self.out / "tensorboard"),
            ("resolved config", self.out / "config.toml"),
            ("checkpoint", self.checkpoint),
        ]

    def _commands(self) -> list[str]:
        return [
            f"{_program('flashtrain')} report {self.out}",
            f'{_program("flashtrain")} sample {self.out} --prompt "class "',
            f"{_program('tensorboard')} --logdir {self.out / 'tensorboard'}",
            f"{_program('flashtrain')} schedule --op reduce_scatter --world 4",
        ]


def _program(name: str) -> str:
    """How to call an installed program from here: by name, or by its path where that is not searched."""
    if shutil.which(name) is not None:
        return name
    path = Path(sys.executable).parent / name
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)
