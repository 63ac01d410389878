"""Embedding on a GPU: the same bits again and again, errors against fp64, sums in fp32, graphs, compilers."""

import pytest
import torch
from torch import Tensor

from flashtrain.kernels.embedding import op, reference
from flashtrain.kernels.weight_gradient import WeightGradient
from flashtrain.models.decoder import Decoder
from flashtrain.nn.embedding import Embedding
from flashtrain.train.optimizer import main_gradients

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
BOUNDS = {torch.bfloat16: 4e-3, torch.float16: 6e-4, torch.float32: 2e-6}


def batch(positions: int, vocabulary: int, hot: float) -> Tensor:
    """Random tokens ``[positions]``, of which one takes the share ``hot``."""
    tokens = torch.randint(0, vocabulary, (positions,), device="cuda")
    return tokens.masked_fill(torch.rand(positions, device="cuda") < hot, 32)


def error(found: Tensor, true: Tensor) -> float:
    assert not found.isnan().any(), "an element was not written"
    return float((found.double() - true).norm() / true.norm().clamp_min(1e-30))


def true_gradient(dy: Tensor, tokens: Tensor, first: int, rows: int) -> Tensor:
    """In fp64: ``[rows, H]``."""
    mine = (tokens >= first) & (tokens < first + rows)
    total = torch.zeros(rows, dy.shape[-1], device="cuda", dtype=torch.float64)
    return total.index_add_(0, tokens[mine] - first, dy[mine].double())


@pytest.mark.parametrize("hot", [0.16, 1.0])
def test_bits_stay_over_200_repetitions_beside_other_work(hot: float) -> None:
    torch.manual_seed(0)
    tokens, dy = batch(8192, 128256, hot), torch.randn(8192, 4096, device="cuda").bfloat16()
    table = torch.empty(32064, 4096, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    main, busy = WeightGradient(table), torch.cuda.Stream()
    a = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
    wanted = wanted_sum = None
    for repetition in range(200):
        with torch.cuda.stream(busy):
            for _ in range(repetition % 4):
                torch.mm(a, a)
        table.grad = None
        op.embedding(tokens, table, 0, 128256).backward(dy)
        main.clear()
        for _ in range(2):
            op.embedding(tokens, table, 0, 128256, main).backward(dy)
        assert table.grad is not None
        wanted = table.grad.clone() if wanted is None else wanted
        wanted_sum = main.total.clone() if wanted_sum is None else wanted_sum
        assert torch.equal(table.grad, wanted), f"other bits in repetition {repetition}"
        assert torch.equal(main.total, wanted_sum), f"other sums in repetition {repetition}"


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize(
    ("positions", "width", "first", "rows"),
    [
        (4099, 4096, 0, 5000),
        (4099, 2048, 1000, 1000),
        (1, 64, 0, 5000),
        (65, 100, 0, 64),
        (9000, 33, 4000, 1000),
    ],
)
@pytest.mark.parametrize("hot", [0.0, 0.2, 1.0])
def test_values_and_gradients_equal_fp64(
    positions: int, width: int, first: int, rows: int, hot: float, dtype: torch.dtype, poisoned_memory: None
) -> None:
    torch.manual_seed(0)
    tokens = batch(positions, 5000, hot)
    table = torch.randn(rows, width, device="cuda").to(dtype).requires_grad_()
    dy = torch.randn(positions, width, device="cuda").to(dtype)
    main, true = WeightGradient(table), true_gradient(dy, tokens, first, rows)
    found = op.embedding(tokens, table, first, 5000)
    assert torch.equal(found, reference.embedding(tokens, table.detach(), first, 5000))
    found.backward(dy)
    assert table.grad is not None
    assert error(table.grad, true) < BOUNDS[dtype]
    others = ~torch.isin(torch.arange(first, first + rows, device="cuda"), tokens)
    assert not table.grad[others].any()
    for _ in range(3):
        op.embedding(tokens, table, first, 5000, main).backward(dy)
    assert error(main.total, 3 * true) < 2e-6
    # Each sum is rounded once: the first of the fp32 sums, rounded, is the narrow gradient.
    main.clear()
    op.embedding(tokens, table, first, 5000, main).backward(dy)
    assert torch.equal(main.total.to(dtype), table.grad)


def test_rows_of_no_token_are_neither_read_nor_written() -> None:
    table = torch.zeros(50, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    main = WeightGradient(table)
    main.total.fill_(torch.nan)
    main.total[7] = 1.0
    main.filled = True
    tokens = torch.full((300,), 7, device="cuda")
    op.embedding(tokens, table, main=main).backward(torch.ones(300, 64, device="cuda").bfloat16())
    assert (main.total[7] == 301).all()
    assert int(main.total.isnan().sum()) == 49 * 64
    empty = op.embedding(tokens[:0], table, main=main)
    empty.backward(torch.ones_like(empty))
    assert (main.total[7] == 301).all()


def test_the_host_waits_for_nothing() -> None:
    tokens, dy = batch(4096, 1000, 0.2), torch.randn(4096, 256, device="cuda").bfloat16()
    table = torch.randn(1000, 256, device="cuda").bfloat16().requires_grad_()
    for main in (None, WeightGradient(table)):
        op.embedding(tokens, table, main=main).backward(dy)  # compiles
        torch.cuda.set_sync_debug_mode("error")
        try:
            op.embedding(tokens, table, main=main).backward(dy)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_a_cuda_graph_gives_the_bits_of_eager_calls_for_other_tokens() -> None:
    torch.manual_seed(0)
    table = torch.randn(1000, 256, device="cuda").bfloat16()
    static, slopes = batch(3000, 1000, 0.2), torch.randn(3000, 256, device="cuda").bfloat16()
    op.lookup_kernels(static, table, 0, 1000)
    op.gradient_kernels(slopes, static, 0, 1000)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = op.lookup_kernels(static, table, 0, 1000)
        gradient = op.gradient_kernels(slopes, static, 0, 1000)
    for hot in (0.0, 0.5, 1.0):
        tokens = batch(3000, 1000, hot)
        static.copy_(tokens)
        graph.replay()
        assert torch.equal(found, table[tokens])
        assert torch.equal(gradient, op.gradient_kernels(slopes, tokens, 0, 1000))


def test_compiled_code_has_the_bits_of_eager_code_and_the_op_passes_opcheck() -> None:
    torch.manual_seed(0)
    layer = Embedding(1000, 256).to("cuda", torch.bfloat16)
    tokens, dy = batch(3000, 1000, 0.3), torch.randn(3000, 256, device="cuda").bfloat16()
    results = []
    for function in (layer, torch.compile(layer, fullgraph=True)):
        layer.weight.grad = None
        y = function(tokens)
        y.backward(dy)
        results.append((y.detach(), layer.weight.grad))
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))
    torch.library.opcheck(op.lookup_kernels.traced, (tokens[:70], layer.weight, 0, 1000))


def test_a_token_outside_of_the_vocabulary_is_seen_in_the_loss() -> None:
    table = torch.ones(4, 64, device="cuda", dtype=torch.bfloat16)
    tokens = torch.tensor([-1, 12, 0, 7], device="cuda")
    found = op.embedding(tokens, table, 4, 12)
    assert found[:2].isnan().all()
    assert not found[2].any()
    assert (found[3] == 1).all()
    assert op.embedding(tokens, table)[3].isnan().all()


@pytest.mark.parametrize("tied", [False, True])
def test_a_decoder_adds_its_tables_gradient_to_its_fp32_sum(tied: bool) -> None:
    """Where the table is the output projection too, its products add to the same sum."""
    config = Decoder.Config(
        vocabulary=1000, hidden=256, layers=1, heads=4, kv_heads=2, mlp_width=512, tied_embeddings=tied
    )
    torch.manual_seed(0)
    tokens, targets = batch(2048, 1000, 0.3).view(512, 4), batch(2048, 1000, 0.0).view(512, 4)
    model = Decoder(config, torch.Generator().manual_seed(0)).to("cuda", torch.bfloat16)
    wide = Decoder(config, torch.Generator().manual_seed(0)).to("cuda", torch.float64)
    wide(tokens, targets).backward()
    true = wide.embedding.weight.grad
    assert true is not None
    main = main_gradients(model, dict(model.named_parameters()))["embedding.weight"]
    for _ in range(2):
        model(tokens, targets).backward()
    assert model.embedding.weight.grad is None
    assert error(main.total, 2 * true) < 6e-2
