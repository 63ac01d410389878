"""The parallel styles on plain modules, through torch's own ``parallelize_module``."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import parallelize_module

from flashtrain.comm import transport
from flashtrain.errors import UserError
from flashtrain.nn.loss import Head
from flashtrain.parallel import apply, tensor
from flashtrain.parallel.mesh import TENSOR
from tests.distributed import run_distributed

TOLERANCE = 1e-5


class Net(nn.Module):
    """Each kind of layer once, with biases, around a residual that is sharded by rows."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(24, 12)
        self.norm = nn.LayerNorm(12)
        self.up = nn.Linear(12, 36)
        self.down = nn.Linear(36, 12)
        self.head = Head(12, 24)
        self.to(dtype)

    def forward(self, tokens: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        x = self.embedding(tokens)
        x = x + self.down(torch.relu(self.up(self.norm(x))))
        return self.head(x), self.head(x, targets)


def plan(rows: tensor.Rows | None) -> dict[str, tensor._Style]:
    return {
        "embedding": tensor.VocabularyParallel(rows),
        "norm": tensor.SequenceParallel(rows),
        "up": tensor.ColumnParallel(rows),
        "down": tensor.RowParallel(rows),
        "head": tensor.VocabularyParallelHead(rows),
    }


def tensor_mesh(world: int) -> DeviceMesh:
    return init_device_mesh("cpu", (world,), mesh_dim_names=(TENSOR,))


def off(actual: Tensor, wanted: Tensor) -> float:
    return float((actual.double() - wanted.double()).norm() / wanted.double().norm().clamp_min(1e-9))


def _against_one_process(rank: int, world: int) -> list[str]:
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    failures, ranks = [], tensor_mesh(world)
    for mover, kind, subchunks, keep in (
        ("host", "direct", 1, False),
        ("host", "ring", 2, True),
        ("group", "direct", 3, True),
    ):
        transport.configure(
            transport.Settings(transport=mover, kind=kind, subchunks=subchunks, keep_gather=keep)
        )
        for sequence, batch in ((6 * world, 2), (7, 3), (1, 2), (1, 1)):
            plain, model = Net(torch.float32), Net(torch.float32)
            # Where the sequence divides, a shard tells how many rows there are; elsewhere Rows has to.
            rows = None if sequence % world == 0 else tensor.Rows(sequence * batch)
            parallelize_module(model, ranks, plan(rows))
            generator = torch.Generator().manual_seed(sequence)
            tokens, targets = torch.randint(0, 24, (2, sequence, batch), generator=generator)
            logits, loss = plain(tokens, targets)
            loss.backward()
            own_logits, own_loss = model(tokens, targets)
            own_loss.backward()
            apply.sum_replicated_gradients(model, ranks)
            case = f"{mover} {kind} {sequence}x{batch}"
            columns = logits.chunk(world, dim=-1)[rank]
            if off(own_logits.reshape(columns.shape), columns) > TOLERANCE:
                failures.append(f"{case}: logits")
            if sequence % world == 0 and own_logits.shape != columns.shape:
                failures.append(f"{case}: logits {list(own_logits.shape)}")
            if off(own_loss, loss) > TOLERANCE:
                failures.append(f"{case}: loss")
            for name, parameter in plain.named_parameters():
                gradient = model.get_parameter(name).grad
                whole = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
                if off(whole, parameter.grad) > TOLERANCE:
                    failures.append(f"{case}: {name} off by {off(whole, parameter.grad)}")
    return failures


@pytest.mark.parametrize("world", [2, 3])
def test_a_net_of_every_style_equals_one_process(world: int) -> None:
    assert run_distributed(_against_one_process, world) == [[]] * world


def _placements(rank: int, world: int) -> dict[str, str]:
    model = Net(torch.float32)
    model.head.requires_grad_(False)
    reference = {name: p.detach().clone() for name, p in model.named_parameters()}
    ranks = tensor_mesh(world)
    parallelize_module(model, ranks, plan(None))
    for name, parameter in model.named_parameters():
        if isinstance(parameter, DTensor):
            assert torch.equal(parameter.full_tensor(), reference[name]), name
        assert parameter.requires_grad != name.startswith("head"), name
        assert apply.is_tensor_sharded(parameter) == isinstance(parameter, DTensor), name
    replicated = DTensor.from_local(torch.ones(2), ranks, [Replicate()])
    assert not apply.is_tensor_sharded(replicated)
    # The same pieces as torch's own styles would place, so their checkpoints load.
    assert list(model.state_dict()) == list(reference)
    return {
        name: str(p.placements[0]) if isinstance(p, DTensor) else "whole"
        for name, p in model.named_parameters()
    }


def test_parameters_become_dtensors_with_the_usual_placements() -> None:
    wanted = {
        "embedding.weight": str(Shard(0)),
        "norm.weight": "whole",
        "norm.bias": "whole",
        "up.weight": str(Shard(0)),
        "up.bias": str(Shard(0)),
        "down.weight": str(Shard(1)),
        "down.bias": "whole",
        "head.weight": str(Shard(0)),
    }
    assert run_distributed(_placements, 2) == [wanted] * 2


def _row_bias(rank: int, world: int) -> tuple[list[float], list[float]]:
    """Gradients of row biases before and after they are summed over the ranks."""
    transport.configure(transport.Settings(transport="host"))
    ranks, layer = tensor_mesh(world), nn.Linear(4, 3)
    parallelize_module(layer, ranks, tensor.RowParallel())
    layer(torch.ones(5, 4 // world)).sum().backward()
    before = layer.bias.grad.tolist()
    apply.sum_replicated_gradients(layer, ranks)
    return before, layer.bias.grad.tolist()


def test_a_row_bias_sees_its_ranks_rows_until_its_gradients_are_summed() -> None:
    (first, summed), (second, summed_there) = run_distributed(_row_bias, 2)
    assert (first, second) == ([3.0] * 3, [2.0] * 3)
    assert summed == summed_there == [5.0] * 3


def _refusals(rank: int, world: int) -> list[str]:
    ranks, messages = tensor_mesh(world), []
    cases: list[Callable[[], object]] = [
        lambda: parallelize_module(nn.Linear(4, 5), ranks, tensor.ColumnParallel()),
        lambda: parallelize_module(nn.Linear(5, 4), ranks, tensor.RowParallel()),
        lambda: parallelize_module(nn.Embedding(7, 4), ranks, tensor.VocabularyParallel()),
        lambda: parallelize_module(nn.Embedding(8, 4), ranks, tensor.ColumnParallel()),
        lambda: parallelize_module(nn.LayerNorm(8), ranks, tensor.RowParallel()),
        lambda: parallelize_module(nn.Linear(8, 8), ranks, tensor.VocabularyParallel()),
        lambda: apply.parallelize(
            Net(torch.float32), ranks, plan(None) | {"layers.*.up": tensor.ColumnParallel()}
        ),
        lambda: apply.parallelize(Net(torch.float32), ranks),
    ]
    for act in cases:
        try:
            act()
            messages.append("no error")
        except UserError as error:
            messages.append(str(error))
    return messages


def test_what_does_not_fit_is_named() -> None:
    for messages in run_distributed(_refusals, 2):
        assert messages[0].startswith("dimension 0 of weight [5, 4] of Linear does not divide by")
        assert messages[1].startswith("dimension 1 of weight [4, 5] of Linear does not divide by")
        assert messages[2].startswith("dimension 0 of weight [7, 4] of Embedding does not divide")
        assert messages[0].endswith("the tensor-parallel degree 2")
        assert messages[3] == "ColumnParallel applies to Linear, not to Embedding"
        assert messages[4] == "RowParallel applies to Linear, not to LayerNorm"
        assert messages[5] == "VocabularyParallel applies to Embedding, not to Linear"
        assert messages[6] == "the parallel plan names layers.*.up, but the model has no such module"
        assert messages[7] == "up has no style among those of decoder_plan: give parallelize a plan"
        assert not any("\n" in message for message in messages)


def _low_precision(rank: int, world: int) -> list[str]:
    """bf16 layers: as near to fp64 as the same layers in one process are."""
    transport.configure(transport.Settings(transport="host"))
    failures, ranks = [], tensor_mesh(world)
    plain, model = Net(torch.bfloat16), Net(torch.bfloat16)
    exact = Net(torch.bfloat16).double()
    parallelize_module(model, ranks, plan(None))
    tokens, targets = torch.randint(0, 24, (2, 8, 2), generator=torch.Generator().manual_seed(0))
    for net in (plain, model, exact):
        net(tokens, targets)[1].backward()
    apply.sum_replicated_gradients(model, ranks)
    for name, parameter in exact.named_parameters():
        gradient = model.get_parameter(name).grad
        whole = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
        allowed = (
            2 * off(plain.get_parameter(name).grad, parameter.grad) + 2 * torch.finfo(torch.bfloat16).eps
        )
        if whole.dtype != torch.bfloat16 or off(whole, parameter.grad) > allowed:
            failures.append(f"{name}: off by {off(whole, parameter.grad)}, allowed {allowed}")
    return failures


def test_bf16_layers_are_as_good_as_in_one_process() -> None:
    assert run_distributed(_low_precision, 2) == [[], []]
