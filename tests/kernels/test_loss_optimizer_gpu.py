"""Loss and optimizer on a GPU: full sizes, every dtype, against fp64; memory; the same bits again."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear

from flashtrain.kernels.adamw import op as adamw
from flashtrain.kernels.adamw.slot import Hyperparameters, Slot
from flashtrain.kernels.cross_entropy import op
from flashtrain.kernels.weight_gradient import WeightGradient
from flashtrain.nn.linear import Linear

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
BOUNDS = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 2e-5}


def operands(rows: int, hidden: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(rows, hidden, device="cuda").to(dtype)
    weight = (torch.randn(width, hidden, device="cuda") / hidden**0.5).to(dtype)
    targets = torch.randint(0, width, (rows,), device="cuda")
    targets[:: max(2, rows // 10)] = -100
    return x.requires_grad_(), weight.requires_grad_(), targets


def error(found: Tensor, true: Tensor) -> float:
    assert not found.isnan().any(), "an element was not written"
    return float((found.double() - true).norm() / true.norm())


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize(("rows", "width"), [(2048, 32000), (777, 32064), (100, 50257), (3, 128256)])
def test_loss_and_gradients_equal_fp64(
    rows: int, width: int, dtype: torch.dtype, poisoned_memory: None
) -> None:
    x, weight, targets = operands(rows, 512, width, dtype)
    wide = [t.detach().double().requires_grad_() for t in (x, weight)]
    wanted = cross_entropy(linear(*wide), targets)
    wanted.backward()
    chunk_bytes = 300 * width * x.element_size()  # of 2048 rows seven chunks, the last one smaller
    found = []
    for main in (None, WeightGradient(weight), None):
        x.grad = weight.grad = None
        loss = op.in_chunks(x, weight, targets, main, chunk_bytes)
        loss.backward()
        dw = weight.grad if main is None else main.total
        assert x.grad is not None
        assert dw is not None
        assert abs(loss.item() - wanted.item()) < BOUNDS[dtype]
        assert error(x.grad, wide[0].grad) < BOUNDS[dtype]
        assert error(dw, wide[1].grad) < BOUNDS[dtype]
        found.append((loss.detach(), x.grad, dw))
    assert all(torch.equal(one, other) for one, other in zip(found[0], found[2], strict=True)), "other bits"
    with torch.no_grad():
        assert torch.equal(op.in_chunks(x, weight, targets, None, chunk_bytes), found[0][0])


def test_confident_rows_keep_their_gradient() -> None:
    """p - 1 is about 1e-4 here, which a bf16 p, 1, would lose."""
    logits = torch.zeros(64, 4096, device="cuda", dtype=torch.bfloat16)
    targets = torch.arange(64, device="cuda")
    logits[targets, targets] = 17.5
    from flashtrain.kernels.cross_entropy import triton

    true = torch.softmax(logits.double(), -1)
    true[targets, targets] -= 1
    numbers = triton.statistics(logits, targets, 0)
    triton.slopes_(logits, targets, 0, numbers.unsqueeze(0), 0, torch.ones((), device="cuda"))
    torch.testing.assert_close(logits.double(), true, rtol=2**-7, atol=1e-7)


def test_memory_is_that_of_one_chunk() -> None:
    rows, hidden, width = 8192, 1024, 128256
    x, weight, targets = operands(rows, hidden, width, torch.bfloat16)
    main = WeightGradient(weight)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    op.linear_cross_entropy(x, weight, targets, main).backward()
    used = torch.cuda.max_memory_allocated() - before
    assert used < (1 << 30) + width * hidden * 4 + rows * hidden * 2 + (64 << 20)
    assert used < rows * width * 2, "as much as whole logits"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products_add_up_in_fp32(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    dy, x = (torch.randn(2048, n, device="cuda").to(dtype) for n in (640, 512))
    layer = Linear(512, 640, bias=False, device="cuda", dtype=dtype)
    main = layer.weight.main_grad = WeightGradient(layer.weight)
    for _ in range(3):
        layer(x.view(64, 32, 512)).backward(dy.view(64, 32, 640))
    assert layer.weight.grad is None
    assert error(main.total, 3 * dy.double().t() @ x.double()) < 1e-5


def slots_of(dtype: torch.dtype) -> list[Slot]:
    torch.manual_seed(0)
    slots = []
    for size in [(4096, 1024), (1024,), (3,), (333, 77), (8192, 512)]:
        weight = torch.randn(size, device="cuda").to(dtype)
        master = weight if dtype == torch.float32 else weight.float()
        slots.append(Slot(weight, master, torch.zeros_like(master), torch.zeros_like(master), len(size) > 1))
    return slots


@pytest.mark.parametrize("dtype", BOUNDS)
def test_adamw_equals_fp64(dtype: torch.dtype) -> None:
    """The second way has gradients as narrow as the weights."""
    slots, again = slots_of(dtype), slots_of(dtype)
    wide = [[t.double() for t in (slot.master, slot.mean, slot.variance)] for slot in slots]
    ways = adamw.optimizer(slots, 2), adamw.optimizer(again, 2)
    for step in range(1, 6):
        narrow: list[Tensor | None] = [torch.randn_like(slot.weight) for slot in slots]
        gradients = [None if gradient is None else gradient.float() for gradient in narrow]
        values = Hyperparameters(rate=1e-2, beta1=0.9, beta2=0.95, epsilon=1e-8, decay=0.1, update=step)
        squares = ways[0].squares(gradients)
        sums = [
            sum(float(g.double().square().sum()) for g in part) for part in (gradients[:2], gradients[2:])
        ]
        assert squares.tolist() == pytest.approx(sums, rel=1e-12)
        assert torch.equal(squares, ways[1].squares(narrow))
        factor = torch.tensor(0.37, dtype=torch.float64, device="cuda")
        for way, given in zip(ways, (gradients, narrow), strict=True):
            way.update(given, factor, torch.tensor(True, device="cuda"), values)
            way.update(given, factor * torch.nan, torch.tensor(False, device="cuda"), values)
        for slot, (master, mean, variance), gradient in zip(slots, wide, gradients, strict=True):
            assert gradient is not None
            scaled = 0.37 * gradient.double()
            if slot.decays:
                master *= 1 - 1e-3
            mean.mul_(0.9).add_(scaled, alpha=0.1)
            variance.mul_(0.95).addcmul_(scaled, scaled, value=0.05)
            master -= 1e-2 * mean / (1 - 0.9**step) / ((variance / (1 - 0.95**step)).sqrt() + 1e-8)
    for slot, other, true in zip(slots, again, wide, strict=True):
        for one, two, three in zip(
            (slot.master, slot.mean, slot.variance),
            (other.master, other.mean, other.variance),
            true,
            strict=True,
        ):
            torch.testing.assert_close(one.double(), three, rtol=3e-6, atol=1e-6)
            assert torch.equal(one, two)
        assert torch.equal(slot.weight, slot.master.to(dtype))
