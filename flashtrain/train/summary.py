"""What a finished run shows: its loss beside a yardstick, a sample, its files, and what to type next."""

import statistics
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from flashtrain.data import ByteTokenizer
from flashtrain.metrics import StepMetrics
from flashtrain.models.generate import generate
from flashtrain.train import snapshot

PROMPT = "def "
SAMPLE_TOKENS = 240


@dataclass(frozen=True)
class Summary:
    """``held_out`` and ``unigram_entropy`` in nats per token; ``measured`` are this session's steps."""

    out: Path
    checkpoint: Path
    held_out: float
    unigram_entropy: float
    measured: list[StepMetrics]

    def show(self) -> None:
        """Print it. For one process after the ranks have parted; it loads the checkpoint to sample."""
        console = Console(highlight=False)
        figures = Table.grid(padding=(0, 2))
        for name, value in self._figures():
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

    def _figures(self) -> list[tuple[str, str]]:
        lines = [
            ("held-out loss", f"{self.held_out:.4f} nats per token"),
            ("unigram entropy", f"{self.unigram_entropy:.4f} nats per token of the same text"),
        ]
        # The first steps allocate and fill caches.
        steady = self.measured[len(self.measured) // 10 :]
        if steady:
            hidden = [m.overlap for m in steady if m.overlap is not None]
            lines.append(("tokens per second", f"{statistics.median(m.tokens_per_s for m in steady):,.0f}"))
            lines.append(
                ("communication hidden", f"{statistics.median(hidden):.1%}" if hidden else "there is none")
            )
            overhead = statistics.median(m.overhead for m in steady)
            lines.append(("step's own overhead", f"{overhead:.1%} of a step is not model arithmetic"))
        return lines

    def _sample(self) -> str:
        model, config = snapshot.load_model(self.checkpoint)
        tokenizer = ByteTokenizer()
        prompt = tokenizer.encode(PROMPT)
        tokens = generate(
            model, prompt, SAMPLE_TOKENS, context=config["train"]["sequence"], temperature=0.7, seed=0
        )
        return PROMPT + tokenizer.decode(tokens)

    def _paths(self) -> list[tuple[str, Path]]:
        return [
            ("loss curve", self.out / "loss.png"),
            ("metrics", self.out / "metrics.jsonl"),
            ("TensorBoard", self.out / "tensorboard"),
            ("resolved config", self.out / "config.toml"),
            ("checkpoint", self.checkpoint),
        ]

    def _commands(self) -> list[str]:
        return [
            f'flashtrain sample {self.out} --prompt "class "',
            f"tensorboard --logdir {self.out / 'tensorboard'}",
            "flashtrain schedule --op reduce_scatter --world 4",
        ]
