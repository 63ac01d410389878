"""The part of a report about GPUs: what each said of itself while the run went on."""

from collections.abc import Callable, Sequence
from itertools import pairwise

from flashtrain.metrics.gpu import GpuSample
from flashtrain.metrics.history import Curve, History
from flashtrain.metrics.page.chart import Chart, Series
from flashtrain.metrics.page.scale import number


def charts(runs: Sequence[tuple[str, History]]) -> list[Chart]:
    """Power, clock, temperature and NVLink rate by step, a curve for each GPU; none without telemetry."""
    sampled = [(name, rank, samples) for name, history in runs for rank, samples in history.telemetry.items()]
    if not any(samples for _, _, samples in sampled):
        return []

    def curves(value: Callable[[GpuSample], float | None]) -> list[Series]:
        found = []
        for index, (name, rank, samples) in enumerate(sampled):
            known = ((sample.step, value(sample)) for sample in samples)
            curve: Curve = {step: float(one) for step, one in known if one is not None}
            found.append(Series(_gpu(runs, name, rank), curve, index))
        return found

    rates = [
        Series(_gpu(runs, name, rank), _rate(samples), index)
        for index, (name, rank, samples) in enumerate(sampled)
    ]
    silent = "n/a: this GPU does not tell"
    return [
        Chart("power", "Power", "watts", curves(lambda sample: sample.power_w), silent),
        Chart("clock", "SM clock", "MHz", curves(lambda sample: sample.sm_clock_mhz), silent),
        Chart("heat", "Temperature", "°C", curves(lambda sample: sample.temperature_c), silent, zero=False),
        Chart("nvlink", "NVLink, sent and received", "GB/s", rates, silent),
    ]


def rows(runs: Sequence[tuple[str, History]]) -> list[dict[str, str]]:
    """What the run did to each GPU; counters tell of the time between its first and last sample."""
    found = []
    for name, history in runs:
        for rank, samples in history.telemetry.items():
            if not samples:
                continue
            first, last = samples[0], samples[-1]
            powers = [sample.power_w for sample in samples if sample.power_w is not None]
            found.append(
                {
                    "gpu": _gpu(runs, name, rank),
                    "samples": f"{len(samples):,}",
                    "power": number(sum(powers) / len(powers), 3) if powers else "n/a",
                    "limit": number(last.power_limit_w, 3),
                    "throttled": _throttled(samples),
                    "corrected": _more(first.ecc_corrected, last.ecc_corrected),
                    "uncorrected": _more(first.ecc_uncorrected, last.ecc_uncorrected),
                    "nvlink": _more(first.nvlink_errors, last.nvlink_errors),
                }
            )
    return found


def _gpu(runs: Sequence[tuple[str, History]], name: str, rank: int) -> str:
    return f"{name}, rank {rank}" if len(runs) > 1 else f"rank {rank}"


def _rate(samples: Sequence[GpuSample]) -> Curve:
    """Bytes over NVLink between two samples over the time between them, in GB/s."""
    curve: Curve = {}
    for before, after in pairwise(samples):
        then, now = _moved(before), _moved(after)
        # Counters begin anew when the driver is loaded again, between two attempts.
        if then is not None and now is not None and now >= then and after.time > before.time:
            curve[after.step] = (now - then) / (after.time - before.time) / 1e9
    return curve


def _moved(sample: GpuSample) -> int | None:
    if sample.nvlink_sent_bytes is None or sample.nvlink_received_bytes is None:
        return None
    return sample.nvlink_sent_bytes + sample.nvlink_received_bytes


def _throttled(samples: Sequence[GpuSample]) -> str:
    """Each reason with the share of the samples that named it."""
    if all(sample.throttled is None for sample in samples):
        return "n/a"
    reasons = dict.fromkeys(reason for sample in samples for reason in sample.throttled or ())
    shares = {
        reason: sum(reason in (sample.throttled or ()) for sample in samples) / len(samples)
        for reason in reasons
    }
    return ", ".join(f"{reason} {share:.0%}" for reason, share in shares.items()) or "never"


def _more(first: int | None, last: int | None) -> str:
    return "n/a" if first is None or last is None else f"{max(0, last - first):,}"
