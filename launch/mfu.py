"""What ``flashtrain bench mfu`` makes of its measurements: one record a system, lines to read, a chart."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

Figures = dict[str, Any]


class Model(NamedTuple):
    """Weights without the input embedding, FLOPs of training on one token, the device's peak in FLOP/s."""

    weights: int
    flops_per_token: float
    peak: float | None


def across_ranks(everyone: Sequence[Mapping[str, Any]]) -> Figures:
    """What all ranks measured, as one: the slowest's time of each step, the most memory, else means."""
    from flashtrain.metrics.step_time import EXPOSED

    accounts = [one["account"] for one in everyone]
    kinds = {kind: statistics.fmean(a["kinds"][kind] for a in accounts) for kind in accounts[0]["kinds"]}
    moving = statistics.fmean(a["moving"] for a in accounts)
    return {
        "step_s": [max(step) for step in zip(*(one["seconds"] for one in everyone), strict=True)],
        **{name: _most(everyone, name) for name in ("peak_bytes", "held_bytes", "allocations", "retries")},
        **{name: _mean(everyone, name) for name in ("power_w", "power_limit_w", "sm_clock_mhz")},
        "throttled": sorted({reason for one in everyone for reason in one["throttled"]}),
        "kinds_s": kinds,
        "exposed_s": kinds[EXPOSED] if moving else None,
        "hidden": 1.0 - kinds[EXPOSED] / moving if moving else None,
    }


def of_rank(timed: Any, account: Any) -> Figures:
    """What this rank measured, as plain data for ``across_ranks``; a Timed and an Account."""
    samples = timed.gpu
    gpu = {
        name: [value for sample in samples if (value := getattr(sample, name)) is not None]
        for name in ("power_w", "power_limit_w", "sm_clock_mhz")
    }
    return {
        "seconds": timed.seconds,
        "peak_bytes": timed.peak_bytes,
        "held_bytes": timed.held_bytes,
        "allocations": timed.allocations,
        "retries": timed.retries,
        "account": account._asdict(),
        "throttled": sorted({reason for sample in samples for reason in sample.throttled or ()}),
        **gpu,
    }


def merged(turns: Sequence[Figures]) -> Figures:
    """One system's turns as one: all its steps, the last turn's account."""
    return {**turns[-1], "step_s": [seconds for turn in turns for seconds in turn["step_s"]]}


def rated(figures: Figures, model: Model, tokens: int, ranks: int) -> Figures:
    """``figures`` with the rates of steps of ``tokens`` tokens on ``ranks`` ranks."""
    step = statistics.median(figures["step_s"])
    each = tokens / step / ranks
    flops = each * model.flops_per_token
    return figures | {
        "median_s": step,
        "tokens_per_s_per_rank": each,
        "weights": model.weights,
        "attention_flops": model.flops_per_token - 6.0 * model.weights,
        "peak_flops": model.peak,
        "tflops_per_s_per_rank": flops / 1e12,
        "mfu": None if model.peak is None else flops / model.peak,
    }


def lines(report: Mapping[str, Any]) -> list[str]:
    """The report for a reader."""
    shown = [line for name, one in report["systems"].items() for line in _system(name, one)]
    systems = list(report["systems"].values())
    if len(systems) > 1:
        ratio = systems[1]["median_s"] / systems[0]["median_s"]
        shown.append(f"flashtrain is {ratio:.3f} times as fast as {list(report['systems'])[1]}")
    for policy, one in report.get("recompute", {}).items():
        shown.append(
            f"recompute {policy:<11}{_ms(one['step_s'])} a step, {_gib(one['peak_bytes'])} at the peak"
        )
    return shown


def _system(name: str, one: Figures) -> list[str]:
    steps = sorted(one["step_s"])
    low, high = steps[len(steps) // 10], steps[-1 - len(steps) // 10]
    rate = f"{one['tokens_per_s_per_rank']:,.0f} tokens/s"
    share = "n/a: the peak of this device is not known"
    if one["peak_flops"] is not None:
        share = (
            f"{one['mfu']:.1%} = (6 x {one['weights']:,} + {one['attention_flops']:,.0f} of attention) FLOPs "
            f"x {rate} / {one['peak_flops'] / 1e12:.1f} TFLOP/s"
        )
    rows = [
        (
            "step",
            f"{_ms(one['median_s'])}, median of {len(steps)} (10th to 90th %: {_ms(low)} to {_ms(high)})",
        ),
        ("a rank does", f"{rate}, {one['tflops_per_s_per_rank']:.3g} TFLOP/s"),
        ("MFU", share),
        ("communication", _communication(one)),
        ("memory", _memory(one)),
    ]
    if one["power_w"] is not None:
        limit = "" if one["power_limit_w"] is None else f" of {one['power_limit_w']:.0f} W"
        clocks = "" if one["sm_clock_mhz"] is None else f", {one['sm_clock_mhz']:.0f} MHz"
        throttled = f", throttled: {', '.join(one['throttled'])}" if one["throttled"] else ""
        rows.append(("GPU", f"{one['power_w']:.0f} W{limit}{clocks}{throttled}"))
    if one.get("attention"):
        rows.append(("attention", one["attention"]))
    whole = sum(one["kinds_s"].values())
    rows.append(("profiled", f"{_ms(whole)} a step, of which"))
    for kind, seconds in one["kinds_s"].items():
        rows.append(("", f"{_ms(seconds):>12} {seconds / whole if whole else 0:6.1%}  {kind}"))
    return [name, *(f"  {title:<14}{text}" for title, text in rows)]


def _communication(one: Figures) -> str:
    if one["hidden"] is None:
        return "none"
    return f"{one['hidden']:.1%} hidden, {_ms(one['exposed_s'])} a step exposed"


def _memory(one: Figures) -> str:
    text = f"{_gib(one['peak_bytes'])} at the peak, {_gib(one['held_bytes'])} between steps"
    if one["allocations"] is None:
        return text
    return f"{text}; after the warm-up {one['allocations']} cudaMalloc, {one['retries']} retries"


def _ms(seconds: float | None) -> str:
    return "n/a" if seconds is None else f"{1e3 * seconds:,.1f} ms"


def _gib(count: int | None) -> str:
    return "n/a" if count is None else f"{count / 2**30:.2f} GiB"


def draw(path: Path, report: Mapping[str, Any]) -> None:
    """Write the chart of where a step's time goes."""
    from flashtrain.train import step_figure

    bars = {name: one["kinds_s"] for name, one in report["systems"].items()}
    first = next(iter(report["systems"].values()))
    share = "MFU n/a" if first["mfu"] is None else f"MFU {first['mfu']:.1%}"
    title = f"{report['recipe']}: {_ms(first['median_s'])} a step, {share}"
    step_figure.draw(path, bars, title)


def _most(everyone: Sequence[Mapping[str, Any]], name: str) -> int | None:
    known = [one[name] for one in everyone if one[name] is not None]
    return max(known) if known else None


def _mean(everyone: Sequence[Mapping[str, Any]], name: str) -> float | None:
    known = [value for one in everyone for value in one[name]]
    return statistics.fmean(known) if known else None
