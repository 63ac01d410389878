"""The host transport tells what went wrong, leaves memory alone when it should, and cleans up."""

import gc
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist

from flashtrain.comm.schedule import all_gather, reduce_scatter
from flashtrain.comm.transport import host
from flashtrain.comm.transport.host import HostTransport, HostUnavailable
from flashtrain.errors import TransportError, UserError
from tests.comm.transport.driving import (
    FileExchange,
    connect,
    drive,
    gather_strings,
    message,
    start_independent,
)
from tests.distributed import run_distributed

RING = 16 << 10
BIG = 1 << 20


def _failure(act: Callable[[], object]) -> str:
    with pytest.raises(TransportError) as caught:
        act()
    return str(caught.value)


def _out_of_step(rank: int, world: int) -> list[str]:
    schedule, texts = all_gather((8, 8), rank), []
    (send, _), (_, expect) = message(rank, 1 - rank), message(1 - rank, rank)
    for case in ("site", "operation", "size", "chunk", "slot"):
        transport = connect(rank, world)
        odd = rank == 1
        if case == "operation" and odd:
            transport.open(schedule, "skipped").close()
        tensor = torch.zeros(9 if case == "size" and odd else 8)
        sent = send._replace(**{case: 0}) if case in ("chunk", "slot") else send

        def act(transport=transport, case=case, odd=odd, tensor=tensor, sent=sent) -> None:
            with transport.open(schedule, "layer.7" if case == "site" and odd else "layer.3") as exchange:
                exchange.transfer(0, {sent: tensor}, {expect: torch.zeros_like(tensor)})
                exchange.wait(1, expect)

        texts.append(_failure(act) if rank == 0 or case not in ("chunk", "slot") else "")
        if case in ("chunk", "slot") and rank == 1:
            act()  # what rank 0 sends is in step
        dist.barrier()
        transport.shutdown()
    return texts


def test_ranks_out_of_step_are_told_what_came_and_what_was_expected() -> None:
    site, operation, size, chunk, slot = run_distributed(_out_of_step, 2)[0]
    for text in (site, operation, size, chunk, slot):
        assert text.startswith(
            "rank 0: layer.3: all_gather step 1 of 2, chunk 1, peer rank 1: expected operation 0"
        )
        assert "(layer.3: direct all_gather)" in text
        assert "rank 1 sent operation" in text
        assert "out of step" in text
    assert "sent operation 0 (layer.7: direct all_gather) step 0, chunk 1, slot 1, 32 bytes" in site
    assert "sent operation 1 (layer.3" in operation
    assert "slot 1, 36 bytes" in size.partition("sent")[2]
    assert "chunk 0, slot 1" in chunk.partition("sent")[2]
    assert "chunk 1, slot 0" in slot.partition("sent")[2]


def _time_outs(rank: int, world: int) -> list[str]:
    transport, texts = connect(rank, world, timeout=0.4, ring_bytes=RING), []
    send = message(0, 1)[0]
    back = message(1, 0)[1]
    if rank == 0:

        def receive() -> None:
            with transport.open(reduce_scatter((BIG, BIG), 0), "blocks.2.mlp") as exchange:
                exchange.transfer(0, {}, {back: torch.zeros(BIG)})
                exchange.wait(1, back)

        def deliver() -> None:
            with transport.open(all_gather((BIG, BIG), 0), "blocks.3.mlp") as exchange:
                exchange.transfer(0, {send: torch.zeros(BIG)}, {})

        texts = [_failure(receive), _failure(deliver)]
    dist.barrier()
    transport.shutdown()
    return texts


def test_time_out_names_site_op_step_chunk_and_peer() -> None:
    received, sent = run_distributed(_time_outs, 2)[0]
    assert received == (
        "rank 0: blocks.2.mlp: reduce_scatter step 1 of 2, chunk 1, peer rank 1: no data for 0.4 s"
    )
    assert sent == (
        "rank 0: blocks.3.mlp: all_gather step 0 of 2, chunk 0, peer rank 1: "
        "the peer has taken no data for 0.4 s"
    )


def _slow_but_alive(rank: int, world: int) -> None:
    transport = connect(rank, world, timeout=0.5)
    schedule = all_gather((4, 4), rank)
    for turn in range(3):
        if rank == 1:
            time.sleep(0.3)
        drive(transport, schedule, salt=turn)
    transport.shutdown()


def test_time_out_counts_silence_only() -> None:
    run_distributed(_slow_but_alive, 2)


def _victim(rank: int, world: int, exchange: FileExchange, folder: str, ending: str) -> None:
    transport = HostTransport(rank, world, 60, exchange, ring_bytes=RING)
    drive(transport, all_gather((5, 5, 5), rank))
    report = Path(folder) / f"report-{rank}"
    expect = message(1, rank)[1]
    if rank == 1:
        exchange("ready")
        with transport.open(all_gather((BIG, BIG, BIG), 1), "doomed") as operation:
            # Rank 0 gets the beginning of a message, rank 2 a whole one, which must still arrive.
            operation.transfer(0, {message(1, 0)[0]: torch.zeros(BIG), message(1, 2)[0]: torch.zeros(1)}, {})
            time.sleep(0.3)
            if ending == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            transport.shutdown()
            os._exit(0)
    exchange("ready")
    operation = transport.open(all_gather((BIG, BIG, BIG), rank), "doomed")
    if rank == 2:
        time.sleep(1)  # the sender is long gone
        operation.transfer(0, {}, {expect: torch.zeros(1)})
        operation.wait(1, expect)
        operation.close()
        report.write_text("arrived")
        return
    time.sleep(0.5)
    start = time.monotonic()
    operation.transfer(0, {}, {expect: torch.zeros(BIG)})
    text = _failure(lambda: operation.wait(1, expect))
    report.write_text(f"{time.monotonic() - start:.3f} {text}")


@pytest.mark.parametrize(
    ("ending", "words"),
    [("kill", "rank 1 has died (process "), ("shutdown", "rank 1 has shut its transport down")],
)
def test_the_end_of_a_peer_is_noticed_at_once(tmp_path: Path, ending: str, words: str) -> None:
    ranks = start_independent(_victim, 3, tmp_path / "ranks", str(tmp_path), ending)
    for process in ranks:
        process.join(timeout=60)
    assert [process.exitcode for process in ranks] == [0, -9 if ending == "kill" else 0, 0]
    seconds, _, text = (tmp_path / "report-0").read_text().partition(" ")
    assert text.startswith("rank 0: doomed: all_gather step 1 of 3, chunk 1, peer rank 1: " + words)
    assert float(seconds) < 5  # of a time-out of 60
    assert (tmp_path / "report-2").read_text() == "arrived"


def test_a_reused_pid_is_another_process() -> None:
    mine = host._core.process_start_time(os.getpid())
    assert mine == int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    child = subprocess.Popen(["true"])
    while psutil.Process(child.pid).status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.01)
    assert host._core.process_start_time(child.pid) == 0  # a zombie has a pid and is dead
    child.wait()
    assert host._core.process_start_time(child.pid) == 0


def _leaves_quietly(rank: int, world: int, exchange: FileExchange) -> None:
    transport = HostTransport(rank, world, 60, exchange)
    drive(transport, all_gather((BIG, BIG), rank))
    drive(transport, all_gather((BIG, BIG), rank))
    if rank == 0:
        globals()["kept"] = transport  # until the very end of the interpreter, without shutdown


def test_nothing_is_left_behind(tmp_path: Path) -> None:
    before = set(os.listdir("/dev/shm"))
    ranks = start_independent(_leaves_quietly, 2, tmp_path / "ranks")
    for process in ranks:
        process.join(timeout=30)
    assert [process.exitcode for process in ranks] == [0, 0]  # neither hung nor crashed at exit
    assert not any(name not in before and "flashtrain" in name for name in os.listdir("/dev/shm"))


def test_the_interpreter_exits_with_an_operation_under_way() -> None:
    script = (
        "import os, torch\n"
        "from flashtrain.comm.schedule import Expect, Send, all_gather\n"
        "from flashtrain.comm.transport.host import HostTransport\n"
        "import threading\n"
        "kept, both, box = [], threading.Barrier(2), [None, None]\n"
        "def rank(r):\n"
        "    def gather(text):\n"
        "        box[r] = text; both.wait(); texts = list(box); both.wait(); return texts\n"
        "    t = HostTransport(r, 2, 60, gather, ring_bytes=4096)\n"
        "    e = t.open(all_gather((1 << 20, 1 << 20), r), 'exit')\n"
        "    o = 1 - r\n"
        "    e.transfer(0, {Send(r, o, r): torch.zeros(1 << 20)}, {Expect(o, o, o): torch.zeros(1 << 21)})\n"
        "    kept.extend((t, e))\n"
        "threads = [threading.Thread(target=rank, args=(r,)) for r in range(2)]\n"
        "[t.start() for t in threads]; [t.join() for t in threads]\n"
        "print('end', flush=True)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "end\n", "")


def test_an_interpreter_that_exits_without_shutdown_tells_its_peers(tmp_path: Path) -> None:
    script = (
        "from flashtrain.comm.transport.host import HostTransport\n"
        "from tests.comm.transport.driving import FileExchange\n"
        f"kept = HostTransport(1, 2, 60, FileExchange({str(tmp_path)!r}, 1, 2))\n"
        "import threading, time\n"  # a thread's frame outlives every destructor
        "threading.Thread(target=lambda kept: time.sleep(60), args=(kept,), daemon=True).start()\n"
    )
    peer = subprocess.Popen([sys.executable, "-c", script], cwd=Path(__file__).resolve().parents[3])
    transport = HostTransport(0, 2, 60, FileExchange(str(tmp_path), 0, 2))
    expect = message(1, 0)[1]
    exchange = transport.open(all_gather((1, 1), 0), "left alone")
    exchange.transfer(0, {}, {expect: torch.zeros(1)})
    assert "rank 1 has shut its transport down" in _failure(lambda: exchange.wait(1, expect))
    exchange._abort()
    transport.shutdown()
    assert peer.wait(timeout=30) == 0


def _frees(rank: int, world: int) -> None:
    process = psutil.Process()
    threads, files = process.num_threads(), process.num_fds()
    for _ in range(3):
        transport = connect(rank, world)
        drive(transport, all_gather((BIG, BIG), rank))
        assert "memfd:flashtrain" in Path("/proc/self/maps").read_text()
        transport.shutdown()
        transport.shutdown()
        with pytest.raises(TransportError, match="was shut down"):
            transport.open(all_gather((1, 1), rank), "late")
    assert "memfd:flashtrain" not in Path("/proc/self/maps").read_text()
    assert (process.num_threads(), process.num_fds()) == (threads, files)


def test_shutdown_frees_threads_memory_and_descriptors() -> None:
    run_distributed(_frees, 2)


def _idles(rank: int, world: int) -> float:
    transport = connect(rank, world)
    drive(transport, all_gather((BIG, BIG), rank))
    expect = message(1 - rank, rank)[1]
    exchange = transport.open(all_gather((8, 8), rank), "idle")
    exchange.transfer(0, {}, {expect: torch.zeros(8)})  # a receive that stays open
    dist.barrier()
    before = psutil.Process().cpu_times()
    time.sleep(1)
    after = psutil.Process().cpu_times()
    exchange._abort()
    dist.barrier()
    transport.shutdown()
    return after.user + after.system - before.user - before.system


def test_an_idle_transport_uses_no_processor() -> None:
    assert max(run_distributed(_idles, 2)) < 0.1


def _gives_up(rank: int, world: int) -> None:
    transport = connect(rank, world, timeout=20, ring_bytes=8 * RING)
    size = 2 << 20
    schedule = all_gather((size, size), rank)
    (send, _), (_, expect) = message(rank, 1 - rank), message(1 - rank, rank)
    for ending in ("raise", "drop"):
        landing = torch.zeros(size, dtype=torch.uint8)
        view = landing[:]
        exchange = transport.open(schedule, "given up")
        if rank == 0:
            exchange.transfer(0, {}, {expect: view})
            while not landing[0]:
                time.sleep(1e-4)  # the transfer is under way
            if ending == "raise":
                with pytest.raises(KeyError), exchange:
                    raise KeyError
            else:
                del exchange, view
                gc.collect()
            landing.fill_(7)
            time.sleep(0.1)
            assert landing.eq(7).all()
        else:
            with exchange:
                exchange.transfer(0, {send: torch.ones(size, dtype=torch.uint8)}, {})
        # The rest of what the peer sent is dropped, and the next operation is in step.
        drive(transport, schedule, salt=3)
    if rank == 1:
        transport.timeout = 0.3
        exchange = transport.open(schedule, "cut off")
        exchange.transfer(0, {send: torch.ones(size, dtype=torch.uint8)}, {})
        assert "taken no data" in _failure(exchange.close)  # one ring full of it has left
        with transport.open(schedule, "next") as after:
            after.transfer(0, {send: torch.ones(1)}, {})
            dist.barrier()
    else:
        dist.barrier()
        exchange = transport.open(schedule, "cut off")
        exchange.transfer(0, {}, {expect: torch.zeros(size, dtype=torch.uint8)})
        assert "broke off after" in _failure(lambda: exchange.wait(1, expect))
        assert "broke off after" in _failure(exchange.close)
    dist.barrier()
    transport.shutdown()


def test_an_operation_that_was_given_up_touches_no_tensor() -> None:
    run_distributed(_gives_up, 2)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({}, ""),
        ({1: "other-boot"}, "ranks 0 and 1 run in different machines"),
        ({2: "77"}, "ranks 0 and 1 run in different pid namespaces"),
        ({0: "99"}, "different builds of flashtrain._core"),
        ({4: "9999"}, "cannot map the memory of rank 1: cannot open /proc/"),
        ({6: "5"}, "is not the segment that was announced"),
        (None, "rank 1 has no shared memory: out of it"),
    ],
)
def test_ranks_that_cannot_share_memory_are_refused(change: dict[int, str] | None, words: str) -> None:
    peer = host._core.HostTransport(1, 2, RING)

    def exchange(text: str) -> list[str]:
        fields = text.split(":")
        if len(fields) < 7:
            return [text, ""]
        numbers = peer.address
        fields[3:] = map(str, (numbers.pid, numbers.descriptor, numbers.start_time, numbers.token))
        for index, value in (change or {}).items():
            fields[index] = value
        return [text, "error:out of it" if change is None else ":".join(fields)]

    if change == {}:
        HostTransport(0, 2, 1.0, exchange).shutdown()  # the stand-in is in order but for the changes
        return
    with pytest.raises(HostUnavailable, match="use the group transport") as caught:
        HostTransport(0, 2, 1.0, exchange)
    assert words in str(caught.value)
    peer.shutdown()
    assert "memfd:flashtrain" not in Path("/proc/self/maps").read_text()


def _refused_everywhere(rank: int, world: int) -> str:
    def one_lies(text: str) -> list[str]:
        return gather_strings("cannot: permission denied" if rank == 1 and not text else text)

    with pytest.raises(HostUnavailable) as caught:
        HostTransport(rank, world, 1.0, one_lies)
    return str(caught.value)


def test_all_ranks_refuse_together() -> None:
    assert len(set(run_distributed(_refused_everywhere, 2))) == 1


def test_the_missing_extension_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "_core", None)
    monkeypatch.setattr(host, "_missing", "no module")
    assert not host.available()
    with pytest.raises(HostUnavailable, match=r"without its C\+\+ extension"):
        HostTransport(0, 1, 1.0, lambda text: [text])


def _misuse(rank: int, world: int) -> None:
    transport = connect(rank, world, timeout=60)
    expect = message(1, 0)[1]
    if rank == 0:
        exchange = transport.open(all_gather((8, 8), 0), "misuse")
        with pytest.raises(ValueError, match="before its transfer"):
            exchange.wait(1, expect)
        with pytest.raises(ValueError, match="contiguous CPU tensors"):
            exchange.transfer(0, {}, {expect: torch.zeros(4, 4).T})
        exchange.transfer(0, {}, {expect: torch.zeros(8)})
        threading.Timer(0.2, signal.raise_signal, (signal.SIGINT,)).start()
        with pytest.raises(KeyboardInterrupt), exchange:
            exchange.wait(1, expect)
        child = os.fork()
        if child == 0:
            try:
                transport.open(all_gather((8, 8), 0), "child")
                os._exit(1)
            except TransportError as error:
                del exchange
                transport.shutdown()
                os._exit(0 if "forked child" in str(error) else 2)
        assert os.waitpid(child, 0)[1] == 0
    else:
        transport.open(all_gather((8, 8), 1), "misuse").close()
    dist.barrier()
    drive(transport, all_gather((BIG, BIG), rank))  # the fork and the interruption did no harm
    transport.shutdown()


def test_misuse_interruption_and_fork() -> None:
    run_distributed(_misuse, 2)


def test_a_ring_that_is_too_small_is_refused() -> None:
    with pytest.raises(UserError, match="at least 4096"):
        HostTransport(0, 1, 1.0, lambda text: [text], ring_bytes=100)
