"""The overlapped ops: values against fp64, and bits against the rule that fixes them."""

import hashlib

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from flashtrain.comm import chunked, collectives, ops, products, transport
from flashtrain.comm.gradients import column, row
from flashtrain.errors import UserError
from tests.comm import oracle
from tests.comm.doubles import Late, LosesChunks
from tests.distributed import run_distributed

ROWS = (8, 7, 1, 2, 13, 0)  # divisible, ragged, fewer rows than ranks, none
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def poison() -> None:
    """Fill fresh memory with NaN in this rank, as ``poisoned_memory`` does in the test process."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True


def compute(given: oracle.Operands, rank: int, keep_gather: bool) -> dict[str, Tensor]:
    """Every result of every op on this rank."""
    group, world, rows = dist.group.WORLD.group_name, given.world, given.x.shape[0]

    def leaf(value: Tensor) -> Tensor:
        return value.clone().requires_grad_()

    def mine(value: Tensor) -> Tensor:
        return oracle.share(value, world, rank).clone()

    results = {}
    for name, gradients in (("column dx", 1), ("column dx with x_full", 2)):
        x, w = leaf(mine(given.x)), leaf(given.up[rank])
        wanted = gradients == 2
        y, x_full = ops.all_gather_matmul(x, w, group, "column", rows, keep_gather, wanted)
        if not (wanted or keep_gather):
            assert x_full.shape == (0, x.shape[1])
        torch.autograd.backward([y, x_full][:gradients], [given.dy[rank], given.dx_full[rank]][:gradients])
        results |= {"column y": y, "column x_full": x_full, name: x.grad, "column dw": w.grad}

    a, w = leaf(given.a[rank]), leaf(given.down[rank])
    z = ops.matmul_reduce_scatter(a, w, group, "row")
    z.backward(mine(given.dz))
    results |= {"row z": z, "row da": a.grad, "row dw": w.grad}

    x = leaf(mine(given.x))
    x_full = collectives.all_gather(x, group, "gather", rows)
    x_full.backward(given.dx_full[rank])
    results |= {"all_gather": x_full, "all_gather dx": x.grad}

    for suffix, scale in (("", 1.0), (" mean", 1.0 / world)):
        x = leaf(given.dx_full[rank])
        shard = collectives.reduce_scatter(x, group, "scatter", scale)
        shard.backward(mine(given.x))
        results |= {f"reduce_scatter{suffix}": shard, f"reduce_scatter{suffix} dx": x.grad}
        results[f"all_reduce{suffix}"] = collectives.all_reduce(given.dx_full[rank], group, "all", scale)
    return {name: value.detach() for name, value in results.items()}


def wrong(given: oracle.Operands, rank: int, kind: str, results: dict[str, Tensor]) -> list[str]:
    """Names of the results that are far from fp64 or differ by a bit from the rule."""
    wanted, sizes = oracle.exact(given.wide(), rank), oracle.exact(given.sizes(), rank)
    assert results.keys() == wanted.keys()
    names = []
    for name, actual in results.items():
        if actual.shape != wanted[name].shape or actual.dtype != given.x.dtype:
            names.append(f"{name}: {list(actual.shape)} {actual.dtype}")
        elif oracle.far(actual, wanted[name], sizes[name], kind, given.world):
            names.append(f"{name}: values")
    for name, bits in oracle.replayed(given, rank, kind).items():
        if not torch.equal(results[name], bits):
            names.append(f"{name}: bits")
    return names


def configurations() -> list[tuple[str, int, torch.dtype, int, bool]]:
    """(kind, sub-chunks, dtype, rows, keep_gather), a slice of the full product that covers every pair."""
    cases = [
        (kind, subchunks, torch.float32, rows, False)
        for kind in ("direct", "ring")
        for subchunks in (1, 2, 3, 5)
        for rows in (ROWS if subchunks in (1, 3) else ROWS[1:3])
    ]
    cases += [
        (kind, subchunks, dtype, rows, True)
        for kind, subchunks in (("direct", 1), ("direct", 2), ("ring", 3))
        for dtype in DTYPES
        for rows in (7, 2)
    ]
    return cases


def all_cases(rank: int, world: int, mover: str) -> tuple[list[str], str]:
    """Failures by name, and a digest of all bits of the direct kind at one sub-chunk."""
    poison()
    failures, digest = [], hashlib.sha256()
    for kind, subchunks, dtype, rows, keep_gather in configurations():
        transport.configure(transport.Settings(transport=mover, kind=kind, subchunks=subchunks))
        given = oracle.draw(world, rows, dtype)
        results = compute(given, rank, keep_gather)
        case = f"{kind} m={subchunks} {dtype} M={rows} keep={keep_gather}"
        failures += [f"{case}: {name}" for name in wrong(given, rank, kind, results)]
        if kind == "direct":
            for name in sorted(results):
                digest.update(results[name].view(torch.uint8).numpy().tobytes())
    names = {mover.name.split()[0] for mover in transport.in_use()}
    assert names == {mover}, names
    return failures, digest.hexdigest()


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_values_and_bits_of_every_op_on_both_transports(world: int) -> None:
    digests = []
    for mover in ("group", "host")[: 1 if world == 1 else 2]:
        failures, digest = zip(*run_distributed(all_cases, world, mover), strict=True)
        assert not any(failures), f"{mover}: {failures}"
        digests.append(digest)
    assert digests[0] == digests[-1]


def _unwritten(rank: int, world: int) -> list[str]:
    poison()
    transport.configure(transport.Settings(transport="group"))
    real = chunked.product

    def forgets_last_row(x: Tensor, w: Tensor, out: Tensor) -> None:
        real(x[:-1], w, out[:-1])

    chunked.product = forgets_last_row
    given = oracle.draw(world, 7, torch.float32)
    return wrong(given, rank, "direct", compute(given, rank, False))


def test_poison_catches_a_product_that_leaves_a_row_unwritten() -> None:
    ranks = run_distributed(_unwritten, 2)
    for names in ranks:
        assert {"column y: values", "row z: values", "row da: values"} <= set(names)
    assert "column dx: values" in ranks[-1]  # a whole product, whose last row is this rank's


def _undelivered(rank: int, world: int) -> list[str]:
    poison()
    group = dist.group.WORLD.group_name
    transport.assign(group, "cpu", LosesChunks(rank, world, 1.0))
    given = oracle.draw(world, 7, torch.float32)
    return wrong(given, rank, "direct", compute(given, rank, False))


def test_poison_catches_chunks_that_never_arrive() -> None:
    every_result = set(oracle.exact(oracle.draw(2, 7, torch.float32).wide(), 0))
    for names in run_distributed(_undelivered, 2):
        assert {name.split(":")[0] for name in names if name.endswith(": values")} == every_result


def _delayed(rank: int, world: int) -> list[str]:
    poison()
    failures = []
    group = dist.group.WORLD.group_name
    for mover, kind, subchunks in (("host", "direct", 2), ("group", "direct", 1), ("host", "ring", 2)):
        transport.configure(transport.Settings(transport=mover, kind=kind, subchunks=subchunks))
        real = transport.of(group, torch.device("cpu"))
        transport.assign(group, "cpu", Late(real))
        for rows in (7, 2):
            given = oracle.draw(world, rows, torch.bfloat16)
            for _ in range(2):
                found = wrong(given, rank, kind, compute(given, rank, False))
                failures += [f"{mover} {kind} M={rows}: {name}" for name in found]
    return failures


def test_bits_do_not_depend_on_when_ranks_come() -> None:
    assert run_distributed(_delayed, 3) == [[], [], []]


def _two_groups(rank: int, world: int) -> list[str]:
    """Rows and columns of a 2 x 2 mesh take turns, two sites of each."""
    poison()
    failures = []
    for mover in ("host", "group"):
        transport.configure(transport.Settings(transport=mover, subchunks=2))
        pairs = [
            [dist.new_group(list(ranks)) for ranks in halves]
            for halves in (((0, 1), (2, 3)), ((0, 2), (1, 3)))
        ]
        row, column = pairs[0][rank // 2], pairs[1][rank % 2]
        for turn in range(6):
            group, place, seed = (row, rank % 2, rank // 2) if turn % 2 else (column, rank // 2, 7 + rank % 2)
            given = oracle.draw(2, 7, torch.float32, seed + turn)
            w = given.up[place]
            y, _ = ops.all_gather_matmul(oracle.share(given.x, 2, place), w, group.group_name, "column", 7)
            z = ops.matmul_reduce_scatter(given.a[place], given.down[place], group.group_name, "row")
            if not torch.equal(y, oracle.product(given.x, w)):
                failures.append(f"{mover} turn {turn}: y")
            partials = [oracle.product(a, w) for a, w in zip(given.a, given.down, strict=True)]
            if not torch.equal(z, oracle.reduced(partials, place, "direct")):
                failures.append(f"{mover} turn {turn}: z")
    return failures


def test_two_groups_that_share_ranks_do_not_mix() -> None:
    assert run_distributed(_two_groups, 4) == [[]] * 4


def _shapes_and_layouts(rank: int, world: int) -> list[str]:
    """More than two dimensions, none, integers, fp64 and strides."""
    poison()
    transport.configure(transport.Settings(transport="host"))
    group, failures = dist.group.WORLD.group_name, []

    def check(name: str, actual: Tensor, wanted: Tensor) -> None:
        if actual.dtype != wanted.dtype or not torch.equal(actual, wanted):
            failures.append(name)

    whole = torch.arange(5 * 2 * 3, dtype=torch.float32).view(5, 2, 3)
    check("3-d gather", collectives.all_gather(whole.tensor_split(world)[rank], group, "", 5), whole)
    check(
        "3-d scatter",
        collectives.reduce_scatter(whole * (rank + 1), group),
        (whole * 3).tensor_split(world)[rank],
    )
    check("empty scatter", collectives.reduce_scatter(whole[:0], group), whole[:0])
    check(
        "empty columns",
        collectives.reduce_scatter(whole[..., :0], group),
        whole[..., :0].tensor_split(world)[rank],
    )
    check(
        "integers",
        collectives.all_reduce(torch.tensor([2**40 + rank, 7]), group),
        torch.tensor([2**41 + 1, 14]),
    )
    check(
        "fp64",
        collectives.all_reduce(torch.tensor(0.1, dtype=torch.float64), group),
        torch.tensor(0.2, dtype=torch.float64),
    )
    check("scalar", collectives.all_reduce(torch.tensor(1.5), group, scale=0.5), torch.tensor(1.5))
    strided = torch.arange(48.0).view(6, 8).t()  # [8, 6], columns contiguous
    weight = torch.arange(96.0).view(6, 16).t() / 96
    y, x_full = ops.all_gather_matmul(strided[rank::2], weight, group)
    check("strided x_full", x_full, torch.cat([strided[0::2], strided[1::2]]))
    check("strided y", y, oracle.product(x_full, weight.contiguous()))
    z = ops.matmul_reduce_scatter(strided, weight, group)
    check(
        "strided z",
        z,
        (2 * oracle.product(strided.contiguous(), weight.contiguous())).tensor_split(world)[rank],
    )
    return failures


def test_other_shapes_layouts_and_dtypes() -> None:
    assert run_distributed(_shapes_and_layouts, 2) == [[], []]


def _messages(rank: int, world: int) -> list[str]:
    group, messages = dist.group.WORLD.group_name, []
    transport.configure(transport.Settings(transport="group"))
    for act in (
        lambda: ops.all_gather_matmul(torch.ones(2, 3), torch.ones(4, 5), group),
        lambda: ops.matmul_reduce_scatter(torch.ones(2, 3, 3), torch.ones(4, 3), group),
        lambda: ops.matmul_reduce_scatter(torch.ones(2, 3), torch.ones(4, 3).bfloat16(), group),
        lambda: collectives.all_gather(torch.ones(3, 2), group, "", 9),
        lambda: ops.column_gradients(torch.ones(9, 4), torch.ones(3, 2), torch.ones(4, 2), group),
    ):
        try:
            act()
            messages.append("no error")
        except UserError as error:
            messages.append(str(error))
    return messages


def test_operands_that_do_not_fit_are_named() -> None:
    for rank, messages in enumerate(run_distributed(_messages, 2)):
        share = 5 - rank
        assert messages[0].startswith("operands [2, 3] and [4, 5] do not multiply")
        assert messages[1].startswith("operands [2, 3, 3] and [4, 3] do not multiply")
        assert "torch.float32 and torch.bfloat16" in messages[2]
        for message in messages[3:]:
            assert message.startswith(f"rank {rank} of 2 holds 3 rows, but its share of 9 rows is {share}")
            assert "\n" not in message


def _cancelling(rows: int, columns: int, inner: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Operands whose products are zero but for rounding, so that even bf16 shows the order of additions."""
    half = (inner + 1) // 2
    order = torch.randperm(2 * half)[:inner]
    x, w = torch.randn(rows, half), torch.randn(columns, half)
    return torch.cat([x, x], 1)[:, order].to(dtype).contiguous(), torch.cat([w, -w], 1)[:, order].to(
        dtype
    ).contiguous()


def test_operands_on_another_device_than_the_transport_are_named() -> None:
    mover = LosesChunks(0, 2, 1.0)
    mover.device = torch.device("cuda", 0)
    transport.assign("of the test", "cuda", mover)

    def call(name: str, *operands: Tensor) -> None:
        if name == "gather":
            products.gather_way(*operands, "of the test", None, "layers.3.attention.qkv")
        elif name == "scatter":
            products.scatter_way(*operands, "of the test", "layers.3.attention.qkv")
        elif name == "row":
            row(operands[0], 8, operands[1].t(), "of the test", "layers.3.attention.qkv", lambda dy: None)
        else:
            column(*operands, "of the test", "layers.3.attention.qkv", name == "column", lambda x: None)

    try:
        with FakeTensorMode():
            here, there = (
                [torch.empty(shape, device=f"cuda:{index}") for shape in ((8, 16), (8, 16), (16, 16))]
                for index in (0, 1)
            )
            for name, operands in (
                ("gather", (there[0], here[2])),
                ("gather", (here[0], there[2])),
                ("scatter", (there[0], here[2])),
                ("scatter", (here[0], there[2])),
                ("row", (there[0], here[2])),
                ("column", (there[0], here[1], here[2])),
                ("column, gathering", (here[0], there[1], here[2])),
                ("column, gathering", (here[0], here[1], there[2])),
            ):
                with pytest.raises(
                    UserError, match=r"^layers\.3\.attention\.qkv: .* is on cuda:1, but rank 0 "
                ):
                    call(name, *operands)
        assert not mover.ways
    finally:
        transport.shutdown()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("transposed", [False, True])
def test_bits_of_a_row_do_not_depend_on_how_many_rows_share_its_product(
    dtype: torch.dtype, transposed: bool
) -> None:
    torch.manual_seed(0)
    differing = []
    for inner in (1, 4, 6, 13, 17, 33, 64, 96, 130, 256):
        for columns in (1, 2, 5, 7, 9, 11, 16, 17, 32, 64, 96, 160):
            x, w = _cancelling(72, columns, inner, dtype)
            w = w.t().contiguous().t() if transposed else w
            whole = torch.empty(72, columns, dtype=dtype)
            chunked.product(x, w, whole)
            for rows in range(41):
                first = (rows * 7) % 32
                part = torch.full((rows, columns), float("nan"), dtype=dtype)
                chunked.product(x[first : first + rows], w, part)
                if not torch.equal(part, whole[first : first + rows]):
                    differing.append((inner, columns, rows))
    assert not differing


def test_the_rows_rule_is_needed_and_its_test_can_tell() -> None:
    """Plain products do depend on the number of rows here; were they not to, the filler could go."""
    torch.manual_seed(0)
    differing = set()
    for dtype in (torch.float32, torch.bfloat16):
        for columns in (5, 32):
            x, w = _cancelling(72, columns, 13, dtype)
            whole = x @ w.t()
            if any(not torch.equal(x[:rows] @ w.t(), whole[:rows]) for rows in range(1, 41)):
                differing.add(dtype)
    if not differing:
        pytest.skip("this machine's matrix product has the same bits at every size")
    assert differing
