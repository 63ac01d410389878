"""Launches past Triton's binder, on a driver made of threads: the same parameters, one variant a kind."""

import itertools
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")
import triton.language as tl
from triton._C.libtriton import native_specialize_impl
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime import driver as triton_driver

from flashtrain.kernels import jit
from tests.comm.transport import fake_gpu

core = pytest.importorskip("flashtrain._core", reason="the C++ extension is not built")


class OnGpu(torch.Tensor):
    """A tensor of the host that says otherwise."""

    is_cuda = True
    __torch_function__ = torch._C._disabled_torch_function_impl


_kept: list[torch.Tensor] = []  # for the streams, which run later


def tensor(count: int = 8, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    _kept.append(torch.zeros(count, dtype=dtype).as_subclass(OnGpu))
    return _kept[-1]


def mixture(out, x, missing, count, epsilon, one, big, TIMES: tl.constexpr):  # type: ignore[no-untyped-def]
    tl.store(out, (tl.load(x) + count * epsilon + one + big) * TIMES)


def pinned(out, x, count: tl.int64, TIMES: tl.constexpr):  # type: ignore[no-untyped-def]
    tl.store(out, tl.load(x) + count * TIMES)


@dataclass
class Machine:
    """What is current on the fake GPU, and what Triton launched there by itself."""

    device: int = 0
    stream: fake_gpu.Stream = field(default_factory=fake_gpu.Stream)
    through_triton: list[tuple[Any, ...]] = field(default_factory=list)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    """Triton and the launcher on a fake driver."""
    found = Machine()
    monkeypatch.setattr(jit, "DRIVER", fake_gpu.driver())
    monkeypatch.setattr(jit, "TENSORS", (OnGpu,))
    current = {
        "_cuda_getDevice": lambda: found.device,
        "_cuda_getCurrentRawStream": lambda _: found.stream.handle,
    }
    for name, function in current.items():
        monkeypatch.setattr(torch._C, name, function, raising=False)
    utilities = SimpleNamespace(
        load_binary=lambda *_: (1, fake_gpu.function("note"), 0, 0, 1024),
        get_device_properties=lambda _: {"max_shared_mem": 1 << 17},
    )
    active = SimpleNamespace(
        get_current_device=current["_cuda_getDevice"],
        get_current_stream=current["_cuda_getCurrentRawStream"],
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
        launcher_cls=lambda *_: lambda *arguments: found.through_triton.append(arguments),
        utils=utilities,
    )
    monkeypatch.setattr(triton_driver, "_active", active)
    return found


def test_a_launch_has_the_parameters_that_triton_compiled_for(machine: Machine) -> None:
    """What is compiled in is not passed, and addresses and numbers are this call's."""
    kernel, found = jit.Kernel(mixture), []
    for count, big in ((-3, -(1 << 40)), (5, 1 << 41 | 1)):
        out, x = tensor(dtype=torch.int64), tensor()
        kernel[(2, 3)](out, x, None, count, 0.5, 1, big, TIMES=2, num_warps=4)
        machine.stream.synchronize()
        found.append((out.tolist()[:4], x.data_ptr()))
    assert len(machine.through_triton) == 2, "big is a multiple of 16 in the first call alone"
    out, x = tensor(dtype=torch.int64), tensor()
    compiled = kernel[(2, 3)](out, x, None, 7, 0.25, 1, 3 | 1 << 41, TIMES=2, num_warps=4)
    machine.stream.synchronize()
    assert len(machine.through_triton) == 2
    entry = compiled.asm["ptx"].split(".entry", 1)[1].split(")", 1)[0]
    declared = [int(bits) // 8 for bits in re.findall(r"\.param \.\w(\d+)", entry)]
    assert declared == [8, 8, 4, 4, 8, 8, 8], "as the fake driver's kernel, whose last two are scratch memory"
    quarter = struct.unpack("I", struct.pack("f", 0.25))[0]
    assert out.tolist()[:4] == [x.data_ptr(), 7, quarter, 3 | 1 << 41]


def calls() -> dict[str, tuple[tuple[Any, ...], dict[str, Any]]]:
    """Kinds of calls of ``mixture`` that are compiled each for itself."""
    out, x = tensor(dtype=torch.int64), tensor()
    usual: list[Any] = [out, x, None, 3, 0.5, 1, 5 | 1 << 40]
    kinds: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {}

    def add(name: str, place: int | None, value: Any, **constants: Any) -> None:
        given = list(usual)
        if place is not None:
            given[place] = value
        kinds[name] = tuple(given), {"TIMES": 2, "num_warps": 4, **constants}

    add("usual", None, None)
    add("another dtype", 1, tensor(dtype=torch.bfloat16))
    add("not aligned", 1, tensor()[1:].as_subclass(OnGpu))
    add("a tensor for None", 2, tensor())
    add("multiple of 16", 3, 48)
    add("one", 3, 1)
    add("another constant", None, None, TIMES=3)
    add("True is not 1", None, None, TIMES=True)
    add("1 is not True", None, None, TIMES=1)
    add("other warps", None, None, num_warps=8)
    return kinds


def test_calls_that_triton_tells_apart_are_variants_of_their_own() -> None:
    kinds = calls()
    sizes = [8, 8, 0, 4, 4, 0, 8]  # of the kernel of the fake driver, not of all of these
    found: dict[str, str] = {}
    launcher = core.Launcher(fake_gpu.driver(), lambda *_, **__: "new", lambda: 0, lambda _: 0, (OnGpu,))
    for name, (arguments, constants) in kinds.items():
        assert launcher.launch((0,), *arguments, **constants) == "new", name
        function = fake_gpu.function("note")
        launcher.add(function, "note", 0, 128, sizes, name, arguments, constants)
    for name, (arguments, constants) in kinds.items():
        found[name] = launcher.launch((0,), *arguments, **constants)
    assert found == {name: name for name in kinds}


INTEGERS = [0, 1, 2, 16, -16, -1, 2**31 - 1, -(2**31), 2**31, 2**31 + 1, -(2**31) - 1, -(2**31) - 16]
INTEGERS += [2**63 - 1, -(2**63), 2**63, 2**63 + 1, 2**64 - 16]


def test_integers_of_one_variant_are_one_to_triton() -> None:
    def form(value: int) -> tuple[str, Any]:
        found: tuple[str, Any] = native_specialize_impl(CUDABackend, value, False, True, True)
        return found

    for one, other in itertools.product(INTEGERS, INTEGERS):
        launcher = core.Launcher(fake_gpu.driver(), lambda *_, **__: "new", lambda: 0, lambda _: 0, (OnGpu,))
        out, x = tensor(), tensor()
        call: Callable[[int], tuple[Any, ...]] = lambda value: (out, x, value, 2, 3, 5 | 1 << 40)  # noqa: E731, B023
        sizes = [8, 8, 0, 4, 4, 8]
        launcher.add(fake_gpu.function("note"), "note", 0, 32, sizes, "known", call(one), {})
        wanted = "known" if form(one) == form(other) else "new"
        assert launcher.launch((0,), *call(other)) == wanted, (one, other)


def test_devices_have_variants_of_their_own_and_streams_are_those_of_the_call(
    machine: Machine,
) -> None:
    kernel = jit.Kernel(mixture)

    def start() -> torch.Tensor:
        out = tensor(dtype=torch.int64)
        kernel[(1,)](out, tensor(), None, 3, 0.5, 1, 5 | 1 << 40, TIMES=2)
        return out

    for device in (0, 1, 0, 1):
        machine.device = device
        start()
    assert len(machine.through_triton) == 2
    machine.stream = fake_gpu.Stream()
    out = start()
    machine.stream.synchronize()
    assert out[0] != 0


def test_what_the_launcher_does_not_read_is_left_to_triton(machine: Machine) -> None:
    kernel, out, x = jit.Kernel(mixture), tensor(dtype=torch.int64), tensor()
    usual = (out, x, None, 3, 0.5, 1, 5 | 1 << 40)
    for _ in range(3):
        kernel[lambda _: (1,)](*usual, TIMES=2)  # a grid that depends on the constants
    for _ in range(3):
        kernel[(1,)](*usual, 2)  # a constant by position
    on_host = tensor()
    on_host.is_cuda = False  # type: ignore[misc]
    for _ in range(3):
        kernel[(1,)](out, on_host, *usual[2:], TIMES=2)  # for Triton to refuse
    for _ in range(3):
        jit.Kernel(pinned)[(1,)](out, x, 3, TIMES=2)  # a type that is not the value's own
    assert len(machine.through_triton) == 12
    with pytest.raises(TypeError):
        kernel[(1,)](*usual)


def test_another_layout_of_parameters_is_refused_by_name() -> None:
    launcher = core.Launcher(fake_gpu.driver(), lambda *_, **__: "new", lambda: 0, lambda _: 0, (OnGpu,))
    with pytest.raises(
        RuntimeError, match=r"kernel note has parameters of 8, 8, 4, 4, 8, 8, 8 bytes where 4, 8, 8"
    ):
        launcher.add(fake_gpu.function("note"), "note", 0, 32, [4], "known", (3,), {})


def test_without_the_extension_triton_launches(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        if name == "flashtrain._core":
            raise ImportError(name)
        return import_module(name)

    monkeypatch.setattr(jit, "import_module", missing)
    kernel = jit.Kernel(mixture)
    for _ in range(3):
        kernel[(1,)](tensor(), tensor(), None, 3, 0.5, 1, 5, TIMES=2)
    assert len(machine.through_triton) == 3
