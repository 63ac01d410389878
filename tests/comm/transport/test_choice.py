"""Which transport a process group gets, and what is said when it is not the one that was asked for."""

import importlib
import logging
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from flashtrain.comm import collectives, transport
from flashtrain.comm.transport import host
from flashtrain.errors import TransportError, UserError
from tests.comm.doubles import LosesChunks
from tests.distributed import run_distributed

CPU = torch.device("cpu")


class Lines(logging.Handler):
    """Keeps what ``flashtrain.comm`` logs in this rank."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []
        logger = logging.getLogger("flashtrain.comm")
        logger.addHandler(self)
        logger.setLevel(logging.INFO)

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def chosen(wanted: str) -> tuple[str, list[str]]:
    """The transport that this rank gets, proven by an operation on it, or its refusal; and the log."""
    log, group = Lines(), dist.group.WORLD.group_name
    transport.configure(transport.Settings(transport=wanted, timeout=20.0))
    try:
        name = transport.of(group, CPU).name
    except UserError as error:
        return f"UserError: {error}", log.lines
    own = torch.full((2, 1), float(dist.get_rank()))
    everyone = torch.arange(float(dist.get_world_size())).repeat_interleave(2)
    assert torch.equal(collectives.all_gather(own, group).flatten(), everyone)
    return name, log.lines


def _choose(rank: int, world: int, wanted: str) -> tuple[str, list[str]]:
    return chosen(wanted)


def test_auto_takes_shared_memory_for_cpu_ranks_of_one_machine() -> None:
    for name, log in run_distributed(_choose, 2, "auto"):
        assert name == "host"
        assert log == ["transport for 2 ranks of group 0: host"]


def test_group_is_taken_when_asked_for() -> None:
    for name, log in run_distributed(_choose, 2, "group"):
        assert name == "group over gloo"
        assert log == ["transport for 2 ranks of group 0: group over gloo"]


def test_one_rank_needs_no_shared_memory() -> None:
    for wanted in ("auto", "host"):
        assert run_distributed(_choose, 1, wanted)[0][0] == "group over gloo"


def _choose_without(
    rank: int, world: int, wanted: str, lacking: str, ranks: list[int]
) -> tuple[str, list[str]]:
    """As ``_choose``, where ``ranks`` lack the module or the C++ extension."""
    if rank in ranks and lacking == "extension":
        host._core, host._missing = None, "no shared object"
    elif rank in ranks:
        real = importlib.import_module

        def import_module(name: str, package: str | None = None) -> Any:
            if name.endswith("transport.host"):
                raise ImportError("libstdc++ is too old\nsecond line")
            return real(name, package)

        importlib.import_module = import_module
    return chosen(wanted)


@pytest.mark.parametrize(
    ("lacking", "reason", "ranks"),
    [
        ("module", "libstdc++ is too old", [0, 1, 2]),
        ("module", "libstdc++ is too old", [2]),
        ("extension", "no shared object", [0, 1, 2]),
        ("extension", "no shared object", [0]),
    ],
)
def test_a_rank_without_shared_memory_decides_for_all(lacking: str, reason: str, ranks: list[int]) -> None:
    for name, log in run_distributed(_choose_without, 3, "auto", lacking, ranks):
        assert name == "group over gloo"
        assert len(log) == 2
        assert log[0].startswith("no shared-memory transport for this group: rank 0: ")
        assert reason in log[0]
        assert log[1] == "transport for 3 ranks of group 0: group over gloo"


@pytest.mark.parametrize("ranks", [[0, 1], [1]])
def test_host_without_the_extension_is_refused_on_every_rank(ranks: list[int]) -> None:
    answers = run_distributed(_choose_without, 2, "host", "extension", ranks)
    assert len({name for name, _ in answers}) == 1
    message = answers[0][0]
    assert message.startswith("UserError: comm.transport is host, but rank 0: ")
    assert (
        f"rank {ranks[0]} has no shared memory: flashtrain was installed without its C++ extension" in message
    )
    assert message.endswith("use comm.transport group")
    assert "\n" not in message


def _chosen_alone(rank: int, world: int) -> str:
    """What rank 0 says of a group in which rank 1 makes no transport."""
    group = dist.new_group(timeout=timedelta(seconds=1))
    message = ""
    if rank == 0:
        with pytest.raises(TransportError) as caught:
            transport.of(group.group_name, CPU)
        message = str(caught.value)
    dist.barrier()
    return message


def test_a_rank_that_does_not_come_is_no_reason_to_do_without() -> None:
    message = run_distributed(_chosen_alone, 2)[0]
    assert message.startswith("rank 0: the ranks of group ")
    assert "not all did: " in message
    assert "Timed out waiting 1000ms" in message


def _reconfigured(rank: int, world: int) -> list[str]:
    group, shut = dist.group.WORLD.group_name, []
    transport.configure(transport.Settings(transport="host"))
    first = transport.of(group, CPU)
    assert transport.of(group, CPU) is first
    real = first.shutdown
    first.shutdown = lambda: (shut.append(first.name), real())
    new = transport.Settings(transport="group", kind="ring", subchunks=3)
    transport.configure(new)
    assert transport.settings() is new
    assert transport.in_use() == []
    second = transport.of(group, CPU)
    assert transport.in_use() == [second]
    transport.shutdown()
    assert transport.in_use() == []
    return [*shut, second.name]


def test_configure_shuts_the_old_transports_down_and_chooses_anew() -> None:
    assert run_distributed(_reconfigured, 2) == [["host", "group over gloo"]] * 2


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        (transport.Settings(subchunks=0), "comm.subchunks is 0"),
        (transport.Settings(timeout=0.0), "comm.timeout is 0.0"),
        (transport.Settings(timeout=-1.0), "comm.timeout is -1.0"),
        (transport.Settings(timeout=float("inf")), "comm.timeout is inf"),
        (transport.Settings(timeout=float("nan")), "comm.timeout is nan"),
    ],
)
def test_bad_settings_are_named_and_change_nothing(settings: transport.Settings, name: str) -> None:
    before = transport.settings()
    with pytest.raises(UserError, match=name):
        settings.validate()
    with pytest.raises(UserError, match=name):
        transport.configure(settings)
    assert transport.settings() is before


def test_products_leave_room_for_kernels_of_nccl(monkeypatch: pytest.MonkeyPatch) -> None:
    """A group over NCCL gets few blocks, and products that were prepared before it are forgotten."""
    given: list[dict[str, Any]] = []

    class Options:
        def __init__(self) -> None:
            self.config = SimpleNamespace(max_ctas=None)

    class Group:
        def __init__(self, world: int) -> None:
            self.world = world

        def rank(self) -> int:
            return 0

        def size(self) -> int:
            return self.world

    def new_group(ranks: list[int], **options: Any) -> Any:
        given.append(options)
        return Group(len(ranks))

    monkeypatch.setattr(dist, "ProcessGroupNCCL", SimpleNamespace(Options=Options), raising=False)
    monkeypatch.setattr(dist, "new_group", new_group)
    monkeypatch.setattr(dist, "get_process_group_ranks", lambda group: [0, 1])
    members = {"alone": Group(1), "another": Group(2)}
    monkeypatch.setattr(transport.groups, "resolve", members.__getitem__)
    monkeypatch.setattr(transport.groups, "backend", lambda group, device: "nccl")
    transport.configure(transport.Settings(transport="group"))
    assert transport.spare_sms() == 1
    before = LosesChunks(0, 2, 1.0)
    before.ways["a shape"] = "a way"
    transport.assign("a group of the test", "cuda", before)
    transport.of("alone", torch.device("cuda"))
    assert transport.spare_sms() == 1
    found = transport.of("another", torch.device("cuda"))
    assert found.asynchronous
    assert given[0]["pg_options"].config.max_ctas == transport.spare_sms() == transport.NCCL_BLOCKS
    assert not before.ways
    transport.configure(transport.Settings(transport="group", spare_sms=40))
    assert transport.spare_sms() == 40
    assert transport.of("another", torch.device("cuda")).group is found.group
    assert len(given) == 1  # what NCCL holds is never given back
    transport.configure(transport.Settings())
    with pytest.raises(UserError, match=r"comm\.spare_sms is 0; it must be at least 1"):
        transport.Settings(spare_sms=0).validate()
