"""Transports, and the choice among them: one per process group and device type, made at first use."""

import atexit
import importlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist

from flashtrain.comm import groups
from flashtrain.comm.schedule import Kind
from flashtrain.comm.transport.base import Exchange, Traffic, Transport, capturing
from flashtrain.comm.transport.group import GroupTransport
from flashtrain.errors import TransportError, UserError, first_line

__all__ = [
    "Exchange",
    "Settings",
    "Traffic",
    "Transport",
    "assign",
    "configure",
    "in_use",
    "of",
    "settings",
    "shutdown",
]

log = logging.getLogger("flashtrain.comm")

# Seconds; what counts in nanoseconds has room for no more than ten times as many.
LONGEST_TIMEOUT = 1e9
# The most blocks of a kernel of NCCL, each on a multiprocessor, in groups that go over it.
NCCL_BLOCKS = 16


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How communication runs in this process; the same on every rank.

    ``transport``: auto takes host where all ranks of a group are CPU ranks of one machine, nvlink where they
    have GPUs of one machine that reach each other's memory, else group.
    ``kind`` and ``subchunks``: see ``comm.schedule``; ring adds along the ring, so its bits are its own.
    ``timeout``: seconds without a sign of life from a peer after which an operation fails.
    ``keep_gather``: keep the gathered input of a column-parallel product for its weight gradient,
    W times the activation memory, instead of gathering it again in the backward pass.
    ``fused``: a product and its transfers in one kernel, where nvlink and Hopper GPUs allow it; its bits are
    those of that kernel, without it those of cuBLAS for the rows of each sub-chunk.
    ``tune``: measure the ways of a product once for each of its shapes where it can be fused, and keep the
    fastest (``comm.tune``).
    ``arena_bytes``: the most device memory that the landing buffers of one group may take on nvlink, for
    gathers as for scatters. There are two; gathers of data parallelism have three, or more where more units
    are gathered ahead, if they fit: then what is gathered is read where it landed.
    ``spare_sms``: multiprocessors that fused products leave to other kernels while they wait for their peers.
    Where collectives of NCCL run beside them, as many as those take (``NCCL_MAX_CTAS``), or each could wait
    for what the other keeps from running; groups that this engine itself moves over NCCL see to that.
    ``graphs``: let operations on nvlink be captured in CUDA graphs, once they have run outside of one with
    the same shapes. They then have landing buffers of their own, which doubles that memory.
    """

    transport: Literal["auto", "nvlink", "host", "group"] = "auto"
    kind: Kind = "direct"
    subchunks: int = 1
    timeout: float = 120.0
    keep_gather: bool = False
    fused: bool = True
    tune: bool = True
    arena_bytes: int = 8 << 30
    spare_sms: int = 1
    graphs: bool = False

    def validate(self) -> None:
        """Raises UserError for a setting out of its range."""
        if self.subchunks < 1:
            raise UserError(f"comm.subchunks is {self.subchunks}; it must be at least 1")
        if not 0 < self.timeout <= LONGEST_TIMEOUT:
            raise UserError(
                f"comm.timeout is {self.timeout}; it must be a number of seconds above 0, at most "
                f"{LONGEST_TIMEOUT:.0e}"
            )
        if self.spare_sms < 1:
            raise UserError(f"comm.spare_sms is {self.spare_sms}; it must be at least 1")
        if self.arena_bytes < 4 << 20:
            raise UserError(f"comm.arena_bytes is {self.arena_bytes}; it must be at least {4 << 20} (4 MiB)")


_settings = Settings()
_transports: dict[tuple[str, str, int], Transport] = {}
_own_groups: WeakKeyDictionary[dist.ProcessGroup, dist.ProcessGroup] = WeakKeyDictionary()


def configure(new: Settings) -> None:
    """Set how communication runs from here on. Transports in use are shut down and chosen anew.

    Call it on every rank, at a moment when no operation is under way on any.
    """
    global _settings
    new.validate()
    shutdown()
    _settings = new


def settings() -> Settings:
    """The settings in force."""
    return _settings


def in_use() -> list[Transport]:
    """The transports that have been used so far."""
    return list(dict.fromkeys(_transports.values()))


def spare_sms() -> int:
    """Multiprocessors that fused products leave free now: see ``Settings``."""
    grouped = [one for one in in_use() if isinstance(one, GroupTransport)]
    over_nccl = any(one.asynchronous and one.world > 1 for one in grouped)
    return max(_settings.spare_sms, NCCL_BLOCKS if over_nccl else 1)


def of(group_name: str, device: torch.device, lane: int = 0, buffers: int = 2) -> Transport:
    """The transport that moves tensors of ``device`` between the ranks of the named process group.

    An operation that is to begin while another of the group is under way goes by another ``lane``: a
    transport of its own where one can run only one at a time. ``buffers``: how many landing buffers it gets,
    if it is made now and has any (``nvlink``). Collective over the group at its first call.
    Raises UserError if ``Settings.transport`` asks for one that this group or machine cannot have, or if
    that first call is made while a CUDA graph is captured.

    While a CUDA graph is captured this is another transport, if ``Settings.graphs`` is on. Graphs with
    operations of a group must be replayed one after the other, in the same order on every rank, and not
    after ``shutdown``. The traffic of replays is not counted. After a failure in a replay, the next
    operation outside of graphs and ``check`` raise TransportError.
    """
    key = (group_name, device.type, lane)
    found = _transports.get(key)
    if found is None:
        if device.type == "cuda" and capturing():
            raise UserError(
                f"group {group_name} has no transport yet, and none can be made while a CUDA graph is "
                "captured; set comm.graphs, and run what is to be captured once before"
            )
        first = of(group_name, device) if lane else None
        spare = spare_sms()
        shared = first is not None and not first.one_at_a_time
        found = first if first and shared else _choose(groups.resolve(group_name), device, buffers)
        _transports[key] = found
        if spare_sms() != spare:
            for transport in in_use():
                transport.forget_ways()
        if found is not first:
            log.info("transport for %d ranks of group %s: %s", found.world, group_name, found.name)
    if found.captured is not None and capturing():
        return found.captured
    return found


def assign(group_name: str, device_type: str, transport: Transport) -> None:
    """Let the named group's tensors on ``device_type`` go by ``transport``, whatever the settings say."""
    _transports[group_name, device_type, 0] = transport


def _choose(group: dist.ProcessGroup, device: torch.device, buffers: int = 2) -> Transport:
    wanted, backend = _settings.transport, groups.backend(group, device.type)
    if wanted != "group" and group.size() > 1 and backend != "fake":
        name = {"cpu": "host", "cuda": "nvlink"}.get(device.type, "")
        transport, why_not = None, f"its ranks hold {device.type} tensors"
        if name and wanted in ("auto", name):
            on_gpu = name == "nvlink"
            transport, why_not = _try_nvlink(group, device, buffers) if on_gpu else _try_host(group, device)
        if transport is not None:
            return transport
        if wanted != "auto":
            raise UserError(f"comm.transport is {wanted}, but {why_not}; use comm.transport group")
        log.info("no shared-memory transport for this group: %s", why_not)
    if group.size() > 1 and backend == "nccl":
        group = _over_nccl(group)
    return GroupTransport(group, _settings.timeout, device.type)


def _over_nccl(group: dist.ProcessGroup) -> dist.ProcessGroup:
    """A group of the ranks of ``group`` for this engine alone; the same whenever it is asked for.

    It is kept while ``group`` is: one more at each ``configure`` would hold its connections and device memory
    until the end, and one that took the place of a destroyed one would get its name, and find what that left
    in the store.
    """
    own = _own_groups.get(group)
    if own is None:
        ranks, options = dist.get_process_group_ranks(group), dist.ProcessGroupNCCL.Options()
        options.config.max_ctas = NCCL_BLOCKS
        own = dist.new_group(ranks, backend="nccl", pg_options=options, use_local_synchronization=True)
        _own_groups[group] = own
    return own


def _gather_strings(group: dist.ProcessGroup) -> Callable[[str], list[str]]:
    """Gather one string of each rank as bytes: torch's object collectives unpickle what a peer sends.

    Raises TransportError if a rank does not answer, and then at every later call, so that whoever takes the
    first for a reason to do without something cannot hide it from the others' round.
    """
    device = torch.device("cpu" if groups.backend(group, "cpu") else "cuda")
    failures: list[TransportError] = []

    def gather(own: str) -> list[str]:
        mine = torch.frombuffer(bytearray(f"{own}\n".encode()), dtype=torch.uint8).to(device)
        size = torch.tensor([mine.numel()], device=device)
        sizes = [torch.zeros_like(size) for _ in range(group.size())]
        dist.all_gather(sizes, size, group=group)
        padded = torch.zeros(max(int(one) for one in sizes), dtype=torch.uint8, device=device)
        padded[: mine.numel()] = mine
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded, group=group)
        texts = (part[: int(one) - 1].cpu() for part, one in zip(parts, sizes, strict=True))
        return [text.numpy().tobytes().decode() for text in texts]

    def exchange(own: str) -> list[str]:
        if failures:
            raise failures[0]
        try:
            return gather(own)
        except RuntimeError as error:
            failure = TransportError(
                f"rank {dist.get_rank()}: the ranks of group {group.group_name} were to tell each other what "
                f"they have, and not all did: {first_line(error)}"
            )
            failures.append(failure)
            raise failure from error

    return exchange


def exchange_of(group_name: str) -> Callable[[str], list[str]]:
    """A function that gathers one string from every rank of the named group."""
    return _gather_strings(groups.resolve(group_name))


def _try_nvlink(group: dist.ProcessGroup, device: torch.device, buffers: int) -> tuple[Transport | None, str]:
    from flashtrain.comm.transport.connect import connect

    chosen = _settings
    exchange = _gather_strings(group)
    return connect(group, device, chosen.timeout, chosen.arena_bytes, exchange, chosen.graphs, buffers)


def _try_host(group: dist.ProcessGroup, device: torch.device) -> tuple[Transport | None, str]:
    exchange = _gather_strings(group)
    transport, why_not = None, ""
    try:
        host = importlib.import_module("flashtrain.comm.transport.host")
    except ImportError as error:
        why_not = first_line(error)
        exchange(f"error:{why_not}")  # ranks that have it wait for this one's address
    else:
        try:
            transport = host.HostTransport(group.rank(), group.size(), _settings.timeout, exchange)
        except (OSError, RuntimeError) as error:
            why_not = first_line(error)
    # One rank that cannot map the others' memory decides for all of them.
    refused = [f"rank {rank}: {reason}" for rank, reason in enumerate(exchange(why_not)) if reason]
    if refused and transport is not None:
        transport.shutdown()
        transport = None
    return transport, refused[0] if refused else ""


@atexit.register
def shutdown() -> None:
    """Free the threads and memory of all transports; the next operation chooses anew."""
    for transport in in_use():
        transport.shutdown()
    _transports.clear()
