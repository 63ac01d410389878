"""Kernels launched past Triton's binder on a GPU: bits of Triton's own launches, graphs, streams, threads."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
]


def given(tokens: int = 70) -> tuple[list[Tensor], Any]:
    """Leaves of Mamba-2's middle at odd and even sizes, in bf16, and its sizes."""
    from flashtrain.kernels.mamba2.op import Sizes

    draw = torch.Generator("cuda").manual_seed(tokens)
    heads, width, states = 4, 64, 64
    inner = heads * width
    channels = inner + 2 * states
    shapes = [(tokens, 2, inner + channels + heads), (2, 3, channels), (2, heads, width, states)]
    shapes += [(channels, 4), (channels,), (heads,), (heads,), (heads,), (inner,)]
    kinds = [torch.float32 if index in (2, 5) else torch.bfloat16 for index in range(len(shapes))]
    leaves = [
        torch.randn(shape, generator=draw, device="cuda").to(kind)
        for shape, kind in zip(shapes, kinds, strict=True)
    ]
    leaves[5] = -leaves[5].abs() - 0.1
    return [leaf.requires_grad_() for leaf in leaves], Sizes(heads, width, states, 1, 1e-5)


def outcome(tokens: int = 70) -> list[Tensor]:
    from flashtrain.kernels.mamba2 import op

    leaves, sizes = given(tokens)
    found = op.mix(*leaves[:3], op.Weights(*leaves[3:]), sizes)
    slopes = [torch.randn(t.shape, generator=torch.Generator().manual_seed(1)).to(t) for t in found]
    return [*(t.detach() for t in found), *torch.autograd.grad(found, leaves, slopes)]


@pytest.mark.parametrize("tokens", [70, 64, 1029])
def test_bits_are_those_of_tritons_own_launches(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from flashtrain.kernels.jit import Kernel

    def through_triton(self: Any, grid: Any) -> Any:
        return lambda *arguments, **constants: self.run(*arguments, grid=grid, warmup=False, **constants)

    found = outcome(tokens)
    with monkeypatch.context() as patch:
        patch.setattr(Kernel, "_through_triton", None)  # every variant has been compiled
        again = outcome(tokens)
    monkeypatch.setattr(Kernel, "__getitem__", through_triton)
    for one, two, other in zip(found, again, outcome(tokens), strict=True):
        assert torch.equal(one, other)
        assert torch.equal(two, other)


def test_launches_follow_the_stream_of_the_call_and_are_captured() -> None:
    from flashtrain.kernels.swiglu import triton

    packed = torch.randn(64, 256, device="cuda", dtype=torch.bfloat16)
    wanted, zeros = triton.forward(packed), triton.forward(torch.zeros_like(packed))
    side, late = torch.cuda.Stream(), torch.zeros_like(packed)
    with torch.cuda.stream(side):
        torch.cuda._sleep(100_000_000)
        late.copy_(packed)
        behind = triton.forward(late)
    torch.cuda.synchronize()
    assert torch.equal(behind, wanted), "on another stream it would have come before the copy"
    static, graph = torch.zeros_like(packed), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = triton.forward(static)
    graph.replay()
    assert torch.equal(found, zeros)
    static.copy_(packed)
    graph.replay()
    assert torch.equal(found, wanted)


def test_threads_launch_at_once() -> None:
    wanted = {tokens: outcome(tokens) for tokens in (33, 70)}

    def worker(number: int) -> bool:
        tokens = (33, 70)[number % 2]
        with torch.cuda.stream(torch.cuda.Stream()):
            found = outcome(tokens)
            torch.cuda.current_stream().synchronize()
        return all(map(torch.equal, found, wanted[tokens]))

    torch.cuda.synchronize()
    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(worker, range(16)))


def test_a_tensor_of_the_host_is_refused_as_triton_does() -> None:
    from flashtrain.kernels.swiglu import triton

    triton.forward(torch.zeros(64, 256, device="cuda"))
    kernel, packed = triton.forward_kernel, torch.zeros(64, 256)
    with pytest.raises(ValueError, match="cannot be accessed from Triton"):
        kernel[(1,)](packed, packed.clone(), 64, PAIRS=1, PACKING=64, num_warps=4)
