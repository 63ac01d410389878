"""The startup report of a run: which of its exchanges are overlapped, and why the others are not."""

import json
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import TextIO

from flashtrain.methods.callback import Callback, Run
from flashtrain.metrics.history import SITES
from flashtrain.parallel.sites import Site


class SiteTable(Callback):
    """Prints the sites as a table before the first step, and writes all of them to out/sites.json.

    Sites of several layers that differ in nothing but the layer's number share a line of the table.
    """

    def __init__(self, sites: Sequence[Site], file: TextIO | None = None) -> None:
        self.sites, self._file = sites, file

    def on_start(self, run: Run) -> None:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        run.out.mkdir(parents=True, exist_ok=True)
        text = json.dumps([asdict(site) for site in self.sites], indent=2)
        (run.out / SITES).write_text(text + "\n", encoding="utf-8")
        console = Console(file=self._file or sys.stdout, highlight=False)
        if not console.is_terminal:
            console = Console(file=self._file or sys.stdout, highlight=False, width=160)
        if not self.sites:
            console.print("one rank: there is no communication to overlap")
            return
        table = Table(title=self.heading(), title_justify="left", title_style="bold")
        for column in ("site", "product", "forward", "backward", "overlapped", "how, or why not"):
            table.add_column(column, overflow="fold")
        for site in merged(self.sites):
            answer = Text("yes", "green") if site.overlapped else Text("no", "yellow")
            cells = (site.name, site.product, site.forward, site.backward)
            table.add_row(*map(Text, cells), answer, Text(site.why))
        console.print(table)

    def heading(self) -> str:
        """How many of how many sites are overlapped."""
        return f"{sum(site.overlapped for site in self.sites)} of {len(self.sites)} sites are overlapped"


def merged(sites: Sequence[Site]) -> list[Site]:
    """``sites`` with one for all layers where they agree: ``layers.0-5.mlp.down``. Keeps the order."""
    numbers: dict[Site, list[int]] = {}
    for site in sites:
        parts = re.split(r"(?<=\.)(\d+)(?=[.\s])", f"{site.name} ", maxsplit=1)
        general = site if len(parts) == 1 else replace(site, name=f"{parts[0]}\0{parts[2].rstrip()}")
        numbers.setdefault(general, []).extend(int(number) for number in parts[1:2])
    return [
        replace(site, name=site.name.replace("\0", _ranges(found))) if found else site
        for site, found in numbers.items()
    ]


def _ranges(numbers: Sequence[int]) -> str:
    """[0, 1, 2, 5] as ``0-2,5``."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and number == parts[-1][-1] + 1:
            parts[-1] = [parts[-1][0], number]
        else:
            parts.append([number])
    return ",".join("-".join(map(str, part)) for part in parts)
