"""The host transport delivers: every schedule, any size and type, many operations, interleaved."""

import random
import threading
import time
from itertools import product

import pytest
import torch

from flashtrain.comm.schedule import Expect, Schedule, Send, all_gather, all_to_all, reduce_scatter
from tests.comm.transport.driving import Drive, connect, drive, message
from tests.distributed import run_distributed

RING = 16 << 10


def _schedules(rows: tuple[int, ...], rank: int) -> list[Schedule]:
    made = [all_to_all(rows, rank), all_to_all(rows, rank, subchunks=2)]
    for build, kind, subchunks in product((all_gather, reduce_scatter), ("direct", "ring"), (1, 3)):
        made.append(build(rows, rank, kind=kind, subchunks=subchunks))
    return made


def _round_trips(rank: int, world: int) -> None:
    sizes = random.Random(5)
    transport = connect(rank, world, ring_bytes=RING)
    rounds = [[0] * world, [1] * world, [5 * RING + 3] * world]
    rounds += [[sizes.choice((0, 1, 63, 129, 4095, 30001, 3 * RING)) for _ in range(world)] for _ in range(6)]
    for salt, rows in enumerate(rounds):
        for schedule in _schedules(tuple(rows), rank):
            drive(transport, schedule, salt=salt)
    transport.shutdown()


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_every_schedule_delivers_every_byte(world: int) -> None:
    run_distributed(_round_trips, world)


def _dtypes(rank: int, world: int) -> None:
    transport = connect(rank, world, ring_bytes=RING)
    kinds = (torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.bool, torch.complex64, torch.int64)
    for dtype, rows in product(kinds, (3, 7001)):
        values = torch.arange(rows * 3).reshape(rows, 3).remainder(2).to(dtype)
        landed = torch.zeros_like(values)
        (send, _), (_, expect) = message(rank, 1 - rank), message(1 - rank, rank)
        with transport.open(all_gather((rows, rows), rank), "types") as exchange:
            exchange.transfer(0, {send: values}, {expect: landed})
            exchange.wait(1, expect)
            exchange.wait(1, expect)  # once more is harmless
        assert torch.equal(landed.view(torch.uint8), values.view(torch.uint8))
    transport.shutdown()


def test_any_dtype() -> None:
    run_distributed(_dtypes, 2)


def _many(rank: int, world: int) -> int:
    sizes, delays = random.Random(7), random.Random(rank)
    transport = connect(rank, world, ring_bytes=RING)
    for salt in range(1500):
        rows = tuple(sizes.choice((0, 1, 100, 1000, 9000)) for _ in range(world))
        drive(transport, reduce_scatter(rows, rank), salt=salt)
        if delays.random() < 0.1:
            time.sleep(delays.random() * 2e-3)
    sent = transport.traffic.bytes_sent
    transport.shutdown()
    return sent


def test_thousands_of_operations_back_to_back_with_random_delays() -> None:
    assert min(run_distributed(_many, 3)) > 0


def _runs_ahead(rank: int, world: int) -> None:
    transport = connect(rank, world, timeout=5)
    send, expect = message(0, 1)
    schedule = all_gather((1000, 1000), rank)
    if rank == 0:
        for number in range(50):
            with transport.open(schedule, "ahead") as exchange:
                exchange.transfer(0, {send: torch.full((1000,), number)}, {})
    torch.distributed.barrier()  # all fifty have left before the first is received
    if rank == 1:
        for number in range(50):
            landed = torch.zeros(1000, dtype=torch.int64)
            with transport.open(schedule, "ahead") as exchange:
                exchange.transfer(0, {}, {expect: landed})
                exchange.wait(1, expect)
            assert landed.eq(number).all()
    torch.distributed.barrier()
    transport.shutdown()


def test_a_sender_runs_messages_ahead_of_its_receiver() -> None:
    run_distributed(_runs_ahead, 2)


def _moves_meanwhile(rank: int, world: int) -> None:
    transport = connect(rank, world, ring_bytes=RING)
    (send, _), (_, expect) = message(rank, 1 - rank), message(1 - rank, rank)
    for number, size in enumerate((1, 100, 40 * RING)):
        landing = torch.zeros(size, dtype=torch.uint8)
        with transport.open(all_gather((size, size), rank), "meanwhile") as exchange:
            exchange.transfer(0, {}, {expect: landing})
            torch.distributed.barrier()  # the receivers are asleep before anything is sent
            exchange.transfer(0, {send: torch.full((size,), 9, dtype=torch.uint8)}, {})
            limit = time.monotonic() + 20
            while not landing[-1]:  # nobody waits: the workers must wake each other
                assert time.monotonic() < limit, f"message {number} stands still"
                time.sleep(1e-3)
    torch.distributed.barrier()  # a shutdown would wake everybody
    transport.shutdown()


def test_messages_move_while_nobody_waits() -> None:
    run_distributed(_moves_meanwhile, 2)


def _hands_over(rank: int, world: int, gap: float, rounds: int) -> None:
    transport = connect(rank, world)
    first, second = message(0, 1), (Send(1, 1, 0), Expect(1, 0, 0))
    for _ in range(rounds):
        landing = torch.zeros(1)
        with transport.open(all_gather((1, 1), rank), "hand over") as exchange:
            if rank == 0:
                time.sleep(max(gap, 1e-3))  # the receiver waits
                if gap:
                    exchange.transfer(0, {first[0]: torch.ones(1)}, {})
                    time.sleep(gap)  # it has turned away
                    exchange.transfer(0, {second[0]: torch.ones(1)}, {})
                else:  # both are there before it is awake
                    exchange.transfer(0, {first[0]: torch.ones(1), second[0]: torch.ones(1)}, {})
            else:
                exchange.transfer(0, {}, {first[1]: torch.zeros(1), second[1]: landing})
                exchange.wait(0, first[1])
                limit = time.monotonic() + 20
                while not landing.item():
                    assert time.monotonic() < limit, "the worker was not woken"
                    time.sleep(1e-3)
        torch.distributed.barrier()  # the next message, or a shutdown, would wake everybody
    transport.shutdown()


@pytest.mark.parametrize(("gap", "rounds"), [(0.1, 1), (0, 40)])
def test_what_a_caller_leaves_behind_the_worker_takes(gap: float, rounds: int) -> None:
    run_distributed(_hands_over, 2, gap, rounds)


def _wakes(rank: int, world: int) -> float:
    transport = connect(rank, world)
    schedule = all_gather((1, 1), rank)
    there, back = message(0, 1), message(1, 0)
    start = time.monotonic()
    for _ in range(200):
        with transport.open(schedule, "ping") as exchange:
            first, second = (back, there) if rank else (there, back)
            if rank:
                exchange.transfer(0, {}, {there[1]: torch.zeros(1)})
                exchange.wait(0, there[1])
            exchange.transfer(0, {first[0]: torch.zeros(1)}, {} if rank else {second[1]: torch.zeros(1)})
            if not rank:
                exchange.wait(1, second[1])
    end = time.monotonic()
    transport.shutdown()
    return end - start


def _wakes_late(rank: int, world: int) -> float:
    transport, size, waited = connect(rank, world), 3 << 20, 0.0
    (send, expect), landing = message(0, 1), torch.zeros(size, dtype=torch.uint8)
    for _ in range(200):
        with transport.open(all_gather((1, 1), rank), "late") as exchange:
            if rank == 0:
                exchange.transfer(0, {send: torch.ones(size, dtype=torch.uint8)}, {})
                exchange.close()
            torch.distributed.barrier()  # all of it is in the ring
            if rank == 1:
                landing.zero_()
                exchange.transfer(0, {}, {expect: landing})
                while not landing[0]:
                    pass
                start = time.monotonic()  # while the worker copies
                exchange.wait(0, expect)
                waited += time.monotonic() - start
    transport.shutdown()
    return waited


def test_a_caller_that_comes_while_the_worker_copies_is_woken() -> None:
    assert run_distributed(_wakes_late, 2)[1] < 2  # as below: 0.1 s each time it is not


def test_a_waiting_caller_is_woken_and_does_not_poll() -> None:
    # Callers look by themselves every 0.1 s, which would hide lost wake-ups: 200 of them take 20 s.
    assert max(run_distributed(_wakes, 2)) < 10


def _two_transports(rank: int, world: int) -> None:
    transports = [connect(rank, world, ring_bytes=RING) for _ in range(2)]
    rows = (40001, 7, 20000)
    for salt in range(5):
        with (
            transports[0].open(all_gather(rows, rank), "a") as a,
            transports[1].open(reduce_scatter(rows, rank), "b") as b,
        ):
            first, second = Drive(a, salt), Drive(b, salt)
            while first.step() | second.step():
                pass
        first.check()
        second.check()
    failures: list[BaseException] = []

    def work(index: int) -> None:
        try:
            for salt in range(60):
                drive(transports[index], all_to_all(rows, rank), salt=salt + index)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures
    for transport in transports:
        transport.shutdown()


def test_two_transports_at_once() -> None:
    run_distributed(_two_transports, 3)


def _interleaved(rank: int, world: int) -> None:
    order = random.Random(3)  # the same on all ranks: the rule is one order of (exchange, step)
    transport = connect(rank, world, ring_bytes=RING)
    for round_number in range(40):
        rows = tuple(order.choice((0, 17, 5000, 50001)) for _ in range(world))
        schedules = (all_gather(rows, rank), reduce_scatter(rows, rank, kind="ring"), all_to_all(rows, rank))
        exchanges = [transport.open(schedule, f"site {index}") for index, schedule in enumerate(schedules)]
        drives = [Drive(exchange, round_number + index) for index, exchange in enumerate(exchanges)]
        left = drives[::-1] if round_number == 0 else list(drives)  # once: opened first, posted last
        while left:
            run = left[0] if round_number == 0 else order.choice(left)
            if not run.step():
                left.remove(run)
        for exchange, run in zip(exchanges, drives, strict=True):
            exchange.close()
            run.check()
    transport.shutdown()


def test_interleaved_exchanges_keep_their_data_apart() -> None:
    run_distributed(_interleaved, 3)


def _accounts(rank: int, world: int) -> None:
    transport = connect(rank, world)
    rows = 4 << 20
    start = time.perf_counter()
    drive(transport, all_gather((rows, rows), rank))
    end = time.perf_counter()
    traffic = transport.traffic
    assert traffic.bytes_sent == rows
    assert 0 < traffic.in_flight <= end - start
    assert 0 <= traffic.exposed <= end - start
    # The caller may have copied one direction itself; the sender's thread has surely worked.
    assert 0 < traffic.copying <= 2 * (time.perf_counter() - start)
    (send, _), (_, expect) = message(rank, 1 - rank), message(1 - rank, rank)
    with transport.open(all_gather((1, 1), rank), "clock") as exchange:
        before = time.perf_counter()
        exchange.transfer(0, {send: torch.zeros(1)}, {expect: torch.zeros(1)})
        landed = exchange._wait(1, expect)
        assert before <= landed <= time.perf_counter()
    transport.shutdown()


def test_traffic_is_counted_on_the_clock_of_perf_counter() -> None:
    run_distributed(_accounts, 2)


def _waits_in_threads(rank: int, world: int) -> None:
    transport = connect(rank, world, ring_bytes=RING)
    others = [peer for peer in range(world) if peer != rank]
    for number in range(100):
        landed = {message(peer, rank)[1]: torch.zeros(3001, dtype=torch.int64) for peer in others}
        with transport.open(all_gather((3001,) * world, rank), "threads") as exchange:
            mine = torch.full((3001,), number * world + rank)
            exchange.transfer(0, {message(rank, peer)[0]: mine for peer in others}, landed)
            threads = [threading.Thread(target=exchange._wait, args=(1, expect)) for expect in landed]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            for expect, tensor in landed.items():
                assert tensor.eq(number * world + expect.src).all()
    transport.shutdown()


def test_several_threads_wait_at_once() -> None:
    run_distributed(_waits_in_threads, 3)
