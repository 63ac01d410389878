"""The whole page: which charts, figures and tables a report has, from the histories of its runs."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from importlib import resources
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from markupsafe import Markup

import flashtrain
from flashtrain.metrics.events import ROUTINE, superseded
from flashtrain.metrics.history import History
from flashtrain.metrics.page import gpus
from flashtrain.metrics.page.chart import Chart, Mark, Series, scaled
from flashtrain.metrics.page.scale import Axis, label, number, steps_axis

# The table of events and the marks in the charts show this many, the latest; the lanes show all.
MOST_EVENTS = 200


def render(histories: Sequence[History], names: Sequence[str], now: float) -> str:
    """The HTML page of one run, or of several laid over each other; ``now`` in seconds since 1970."""
    # Names, settings and reasons are other people's text: everything is escaped.
    environment = Environment(
        loader=PackageLoader("flashtrain.metrics.page", "."),
        autoescape=select_autoescape(["html"]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    x = steps_axis(
        step for history in histories for curve in (history.curve("loss"), history.held_out) for step in curve
    )
    runs = list(zip(names, histories, strict=True))
    marks = _marks(histories[0]) if len(histories) == 1 else []
    view = [chart.view(x, marks) for chart in charts(runs)]
    telemetry = [chart.view(x, marks) for chart in gpus.charts(runs)]
    return environment.get_template("page.html").render(
        title=" · ".join(names),
        runs=[_head(name, index, history) for index, (name, history) in enumerate(runs)],
        charts=view,
        telemetry=telemetry,
        gpu_rows=gpus.rows(runs),
        data={"first": x.low, "last": x.high, "charts": {c["key"]: c["series"] for c in view + telemetry}},
        lanes=_lanes(runs, x),
        x_ticks=[{"at": x.place(tick) / 10, "text": label(tick)} for tick in x.ticks],
        events=_events(runs),
        differences=_differences(runs),
        machines=_machines(runs),
        style=Markup(_resource("page.css")),
        script=Markup(_resource("page.js")),
        made=_date(now),
        version=flashtrain.__version__,
    )


def charts(runs: Sequence[tuple[str, History]]) -> list[Chart]:
    """The charts of every report, in the order of the page."""

    def overlaid(metric: str, name: str, factor: float = 1.0, smooth: bool = True) -> list[Series]:
        found = []
        for index, (run, history) in enumerate(runs):
            curve = scaled(history.curve(metric), factor)
            found.append(Series(run if len(runs) > 1 else name, curve, index, smooth=smooth))
        return found

    several = len(runs) > 1
    losses = overlaid("loss", "training")
    for index, (run, history) in enumerate(runs):
        held_out = f"{run}, held out" if several else "held out"
        losses.append(Series(held_out, history.held_out, index if several else 1, "dots"))
    entropies = {history.summary.get("unigram_entropy") for _, history in runs}
    entropy = entropies.pop() if len(entropies) == 1 else None
    steps = overlaid("step_s", "step", 1e3)
    if not several:
        steps.append(
            Series("exposed communication", scaled(runs[0][1].curve("exposed_s"), 1e3), 1, smooth=True)
        )
    no_step = "no step was recorded"
    return [
        Chart(
            "loss", "Loss", "nats per token", losses, no_step, zero=False, log_from=4, wide=True,
            reference=None if not isinstance(entropy, float) else ("unigram entropy", entropy),
        ),
        Chart("throughput", "Throughput", "tokens per second, all ranks",
              overlaid("tokens_per_s", "throughput"), no_step),
        Chart("mfu", "Model FLOP/s utilisation", "% of the device's dense peak",
              overlaid("mfu", "MFU", 100), "n/a: the peak of this device is not known"),
        Chart("overlap", "Hidden communication", "% of the communication time",
              overlaid("overlap", "hidden", 100), "n/a: this run had no communication that could be timed"),
        Chart("step", "Step time", "milliseconds", steps, no_step),
        Chart("memory", "Peak memory", "GiB, rank 0", overlaid("memory_bytes", "peak", 2**-30, False),
              "n/a: this system does not tell"),
        Chart("tflops", "Model arithmetic", "TFLOP/s per rank", overlaid("tflops_per_s", "rate"), no_step),
        Chart("gradient", "Gradient norm", "before clipping",
              overlaid("grad_norm", "norm"), no_step, log_from=20),
        Chart("rate", "Learning rate", "per step", overlaid("learning_rate", "rate", 1.0, False), no_step),
    ]  # fmt: skip


def _head(name: str, index: int, history: History) -> dict[str, Any]:
    """What is said of a run at the top, and its files at the end."""
    losses, ending = history.curve("loss"), history.ending
    last = max(losses, default=0)
    if ending is None:
        # Without the end of the file there is no telling a run that goes on from one that was killed.
        state, said = "open", f"at step {last}: running, or killed"
    elif ending.kind == "end":
        state, said = "done", f"finished at step {ending.step}"
    else:
        state, said = "failed", f"ended at step {ending.step}: {ending.detail.get('reason', ending.kind)}"
    lost = [f"{count} damaged in {file}" for file, count in history.damaged.items()]
    return {
        "name": name,
        "colour": index,
        "folder": str(history.out),
        "state": state,
        "said": said,
        "began": _date(history.events[0].time) if history.events else "",
        "figures": figures(history),
        "config": history.config_text,
        "sites": history.sites,
        "overlapped": sum(bool(site.get("overlapped")) for site in history.sites),
        "damaged": ", ".join(lost),
        "count": len(losses),
    }


def figures(history: History) -> list[dict[str, str]]:
    """The run in a few numbers: name, value, unit. Medians leave out the first tenth, which warms up."""
    losses, held_out = history.curve("loss"), history.held_out
    tokens, seconds = history.curve("tokens"), sum(history.curve("step_s").values())

    def median(metric: str) -> float | None:
        values = list(history.curve(metric).values())
        return statistics.median(values[len(values) // 10 :]) if values else None

    def share(metric: str) -> str:
        value = median(metric)
        return "n/a" if value is None else number(100 * value, 3)

    memory = max(history.curve("memory_bytes").values(), default=None)
    found = [
        ("Held-out loss", number(_last(held_out)), "nats per token"),
        ("Training loss", number(_last(losses)), "nats per token"),
        ("Steps", f"{max(losses, default=0):,}", "done"),
        ("Tokens", label_large(_last(tokens)), "trained on"),
        ("Throughput", label_large(median("tokens_per_s")), "tokens/s, median"),
        ("MFU", share("mfu"), "% of the peak, median"),
        ("Communication hidden", share("overlap"), "% of its time, median"),
        ("Peak memory", number(None if memory is None else memory * 2**-30, 3), "GiB, rank 0"),
        ("Time in steps", duration(seconds), "h:mm:ss"),
        ("Attempts", str(history.attempts or "n/a"), "starts and resumes"),
    ]
    return [{"name": name, "value": value, "unit": unit} for name, value, unit in found]


def label_large(value: float | None) -> str:
    """A large number for reading: 737 k, 16.6 k; n/a for None."""
    if value is None:
        return "n/a"
    for limit, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{number(value / limit, 3)} {prefix}"
    return number(value, 3)


def duration(seconds: float) -> str:
    """Seconds as h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


def _last(curve: Mapping[int, float]) -> float | None:
    return curve[max(curve)] if curve else None


def _marks(history: History) -> list[Mark]:
    notable = [event for event in history.events if event.kind not in ROUTINE]
    return [Mark(event.step, _tone(event.kind), event.describe()) for event in notable[-MOST_EVENTS:]]


def _tone(kind: str) -> str:
    """Which colour an event has; a kind that this report does not know is one to look at."""
    tones = {"checkpoint": "quiet", "start": "calm", "resume": "calm", "end": "good"}
    return tones.get(kind, "bad" if kind in ("failure", "fault", "preempted") else "warn")


def _lanes(runs: Sequence[tuple[str, History]], x: Axis) -> list[dict[str, Any]]:
    """A line of dots for every kind of event of every run."""
    found: dict[tuple[str, str], list[int]] = {}
    for name, history in runs:
        for event in history.events:
            found.setdefault((name, event.kind), []).append(event.step)
    several = len(runs) > 1
    return [
        {
            "name": f"{name}: {_words(kind)}" if several else _words(kind),
            "tone": _tone(kind),
            "count": len(steps),
            "path": "".join(dict.fromkeys(f"M{x.inside(step):.1f} 500h0" for step in steps)),
        }
        for (name, kind), steps in found.items()
    ]


def _events(runs: Sequence[tuple[str, History]]) -> dict[str, Any]:
    rows = []
    for name, history in runs:
        for event, again in zip(history.events, superseded(history.events), strict=True):
            detail = {key: value for key, value in event.detail.items() if key != "machine"}
            rows.append(
                {
                    "time": event.time,
                    "date": _date(event.time),
                    "run": name,
                    "kind": _words(event.kind),
                    "tone": _tone(event.kind),
                    "step": event.step,
                    "detail": ", ".join(f"{_words(key)}: {value}" for key, value in detail.items()),
                    "again": again,
                }
            )
    rows.sort(key=_time)
    return {"rows": rows[-MOST_EVENTS:], "omitted": max(0, len(rows) - MOST_EVENTS)}


def _time(row: Mapping[str, Any]) -> float:
    return float(row["time"])


def _words(name: str) -> str:
    return name.replace("_", " ")


def _differences(runs: Sequence[tuple[str, History]]) -> list[dict[str, Any]]:
    """The settings in which the runs differ."""
    flat = [dict(_flattened(history.config)) for _, history in runs]
    keys = dict.fromkeys(key for one in flat for key in one)
    rows = [{"name": key, "values": [str(one.get(key, "not set")) for one in flat]} for key in keys]
    return [row for row in rows if len(set(row["values"])) > 1]


def _flattened(table: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for name, value in table.items():
        if isinstance(value, Mapping):
            found += _flattened(value, f"{prefix}{name}.")
        else:
            found.append((prefix + name, value))
    return found


def _machines(runs: Sequence[tuple[str, History]]) -> list[dict[str, Any]]:
    """Where the last attempt of each run computed: a row for each fact, a column for each run."""
    shown: dict[str, Callable[[Any], str]] = {
        "memory_bytes": lambda value: f"{value * 2**-30:.1f} GiB",
        "gpus": lambda value: ", ".join(value) or "none",
    }
    facts = list(dict.fromkeys(key for _, history in runs for key in history.machine))
    return [
        {
            "name": _words(fact.removesuffix("_bytes")),
            "values": [_fact(history.machine.get(fact), shown.get(fact, str)) for _, history in runs],
        }
        for fact in facts
    ]


def _fact(value: Any, words: Callable[[Any], str]) -> str:
    return "n/a" if value is None else words(value)


def _date(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def _resource(name: str) -> str:
    return resources.files("flashtrain.metrics.page").joinpath(name).read_text(encoding="utf-8")
