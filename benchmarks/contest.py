"""One site's contest on the ranks of this machine: every system on the same tensors, in turn."""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, TypeVar

import machine
import shapes
import systems
import torch
import torch.distributed as dist
from timing import Call, Samples, measure
from torch import Tensor

from flashtrain.comm import transport
from flashtrain.comm.transport.group import GroupTransport

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
TRANSPORTS = ("host", "group")
Way = Callable[[Tensor, Tensor], Tensor]
Result = TypeVar("Result")
QUIET = 0.05  # part of all processor time that other programs may use while times are taken


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is measured. ``seconds`` is the most that one site and direction may take; for ``patience``
    see ``Ranks.quietly``."""

    device: str
    world: int
    threads_per_rank: int
    dtype: str
    repeats: int
    seconds: float
    patience: float
    input_sets: int
    quick: bool
    only: str


class Ranks:
    """The groups of one rank: one for gloo's collectives, one for the op on each transport."""

    def __init__(self, settings: Settings) -> None:
        self.settings, self.rank, self.world = settings, dist.get_rank(), dist.get_world_size()
        everyone = list(range(self.world))
        self.gloo = dist.new_group(everyone)
        self.groups = {name: dist.new_group(everyone) for name in TRANSPORTS}
        transport.configure(transport.Settings(transport="host"))
        cpu = torch.device("cpu")
        peer_to_peer = self.groups["group"]
        # Settings hold for all groups at once, and changing them would restart the other's transport.
        transport.assign(
            peer_to_peer.group_name, cpu.type, GroupTransport(peer_to_peer, transport.settings().timeout)
        )
        self.traffic = {
            name: transport.of(group.group_name, cpu).traffic for name, group in self.groups.items()
        }

    def fastest(
        self, collectives: dict[str, systems.Collective], tensor: Tensor
    ) -> tuple[str, dict[str, float]]:
        """Name of the fastest gloo way for ``tensor``, and the median of each in milliseconds."""

        def timed(collective: systems.Collective) -> Call:
            return lambda _: collective(tensor, self.gloo)

        calls = {name: timed(collective) for name, collective in collectives.items()}
        repeats = 2 if self.settings.quick else 25
        medians = {
            name: samples.summary()["median"]
            for name, samples in measure(
                calls, repeats=repeats, seconds=self.settings.seconds / 4, sets=1
            ).items()
        }
        return min(medians, key=lambda name: medians[name]), medians

    def quietly(self, work: Callable[[], Result]) -> tuple[Result, float]:
        """Do ``work`` while other programs leave the cores alone; also returns the share that they used.

        Up to ``Settings.patience`` seconds go into waiting for such a moment and trying again; then the
        quietest attempt counts. Collective over the default group.
        """
        best: tuple[Result, float] | None = None
        left = self.settings.patience
        while best is None or (best[1] > QUIET and left > 0):
            start = time.monotonic()
            if self.rank == 0 and left > 0:
                machine.await_quiet(left, QUIET)
            dist.barrier()
            others, own = machine.Others(), time.process_time()
            result = work()
            used = torch.tensor(time.process_time() - own, dtype=torch.float64)
            dist.all_reduce(used)
            verdict = torch.tensor([others.share(float(used)), left - (time.monotonic() - start)])
            dist.broadcast(verdict, 0)
            share, left = verdict.tolist()
            if best is None or share < best[1]:
                best = result, share
        return best


def measure_site(site: shapes.Site, ranks: Ranks) -> list[dict[str, Any]]:
    """One row for each direction."""
    settings = ranks.settings
    rows, outputs, inputs = site.local(ranks.world)
    column, dtype = site.style == "column", DTYPES[settings.dtype]
    # Backward and forward of a site move the same sizes.
    moved = torch.randn(rows, site.width).to(dtype)
    gather, gather_ms = ranks.fastest(systems.GATHERS, moved[: rows // ranks.world].contiguous())
    scatter, scatter_ms = ranks.fastest(systems.SCATTERS, moved)
    sets = [
        systems.Inputs(site, ranks.rank, ranks.world, number, dtype, torch.device("cpu"))
        for number in range(settings.input_sets)
    ]

    def forwards(keep: bool) -> dict[str, Way]:
        collectives = systems.GATHERS[gather], systems.SCATTERS[scatter]
        ways = {"gloo": systems.collectives(site.style, ranks.gloo, *collectives, keep)}
        for name, group in ranks.groups.items():
            ways[name] = systems.overlapped(site.style, group, f"{site.shape}.{site.name}", keep)
        return ways

    found = []
    for direction in ("forward", "backward", "backward, input kept")[: 3 if column else 2]:
        ways = forwards(keep=direction.endswith("kept"))
        calls = (_forward if direction == "forward" else _backward)(ways, sets)
        check_equal(site, direction, {name: calls[name](0) for name in ways})
        counted = dict.fromkeys(TRANSPORTS, 0)
        for name, traffic in ranks.traffic.items():
            traffic.reset()
            calls[name] = _counting(calls[name], counted, name)
        repeats, seconds, number = settings.repeats, settings.seconds, settings.input_sets
        samples, others = ranks.quietly(
            partial(measure, calls, repeats=repeats, seconds=seconds, sets=number)
        )
        found.append(
            {
                **asdict(site),
                "direction": direction,
                "local_mnk": [rows, outputs, inputs],
                "repeats": len(samples["plain"].wall),
                "others_share": round(others, 4),
                "gloo_ways": {"gather": gather, "scatter": scatter},
                "collective_ms": gather_ms | scatter_ms,
                **judge(samples),
                "per_call": {name: _per_call(ranks.traffic[name], counted[name]) for name in TRANSPORTS},
            }
        )
    return found


def _forward(ways: dict[str, Way], sets: list[systems.Inputs]) -> dict[str, Call]:
    def timed(way: Way) -> Call:
        return lambda number: way(sets[number].x, sets[number].w)

    calls = {name: timed(way) for name, way in ways.items()}
    calls["plain"] = lambda number: systems.plain_forward(sets[number].x_full, sets[number].w.detach())
    return calls


def _backward(ways: dict[str, Way], sets: list[systems.Inputs]) -> dict[str, Call]:
    def timed(way: Way) -> Call:
        graphs = [way(inputs.x, inputs.w) for inputs in sets]

        def call(number: int) -> tuple[Tensor, ...]:
            inputs = sets[number]
            return torch.autograd.grad(graphs[number], (inputs.x, inputs.w), inputs.dy, retain_graph=True)

        return call

    def plain(number: int) -> tuple[Tensor, Tensor]:
        inputs = sets[number]
        return systems.plain_backward(inputs.x_full, inputs.w.detach(), inputs.dy_full)

    return {**{name: timed(way) for name, way in ways.items()}, "plain": plain}


def _counting(call: Call, counted: dict[str, int], name: str) -> Call:
    def counting(number: int) -> Any:
        counted[name] += 1
        return call(number)

    return counting


def _per_call(traffic: transport.Traffic, calls: int) -> dict[str, float]:
    """What rank 0's transport counted, per call: bytes sent, and times in milliseconds."""
    parts = ("in_flight", "exposed", "copying", "operating", "computing", "handling")
    times = {f"{part}_ms": round(getattr(traffic, part) / calls * 1e3, 5) for part in parts}
    return {"bytes_sent": traffic.bytes_sent // calls, **times}


def check_equal(site: shapes.Site, direction: str, results: dict[str, Any]) -> None:
    """Raise RuntimeError if a system computed something else: such a time would mean nothing."""
    as_tuple = {name: (r if isinstance(r, tuple) else (r,)) for name, r in results.items()}
    for name, tensors in as_tuple.items():
        for ours, theirs in zip(tensors, as_tuple["gloo"], strict=True):
            wide = theirs.detach().float()
            error = (ours.detach().float() - wide).norm() / wide.norm()
            tolerance = 2e-2 if ours.dtype == torch.bfloat16 else 1e-5
            if not error <= tolerance:
                raise RuntimeError(f"{site.shape} {site.name} {direction}: {name} is off by {error:.2g}")


def judge(samples: dict[str, Samples]) -> dict[str, Any]:
    """Times and what follows from them: G, and how much longer gloo takes than the op."""
    milliseconds = {name: values.summary() for name, values in samples.items()}
    middle = {name: values["median"] for name, values in milliseconds.items()}
    gloo = samples["gloo"].wall
    return {
        "ms": milliseconds,
        "G": {name: round(middle["plain"] / middle[name], 4) for name in middle if name != "plain"},
        "gloo_over": {name: round(middle["gloo"] / middle[name], 4) for name in TRANSPORTS},
        # Median over repetitions of the ratio within one repetition: what drifts, drifts out of it.
        "gloo_over_paired": {
            name: round(float((gloo / samples[name].wall).median()), 4) for name in TRANSPORTS
        },
    }
