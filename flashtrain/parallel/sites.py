"""Every place of a parallelised model where ranks exchange data: overlapped or not, and why."""

from dataclasses import dataclass

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule

from flashtrain.comm import transport
from flashtrain.parallel import branches, ssm, tensor
from flashtrain.parallel.context import SegmentAttention
from flashtrain.parallel.mesh import CONTEXT, TENSOR, token_ranks
from flashtrain.parallel.state_passing import StatePassingMixer

_TOKENS = "tokens"  # the name, here, of token_ranks


@dataclass(frozen=True)
class Site:
    """``forward`` and ``backward`` say what runs there in a pass; ``why`` what hides it, or why nothing does.

    ``product`` is [rows, inputs] x [inputs, outputs] of all ranks together, "" where there is none.
    """

    name: str
    product: str
    forward: str
    backward: str
    overlapped: bool
    why: str


def survey(model: nn.Module, mesh: DeviceMesh, rows: int, device: torch.device) -> list[Site]:
    """The sites of ``model`` after ``parallelize``, in the order of its modules, then those of a step's end.

    ``rows`` of activations go through the model at once, on each rank that sees other tokens. Collective: it
    chooses the transports that are not in use yet.
    """
    names = mesh.mesh_dim_names or ()
    every = {name: mesh[name] for name in (TENSOR, CONTEXT) if name in names}
    if set(names) - {TENSOR}:
        every[_TOKENS] = token_ranks(mesh)
    wide = {name: ranks for name, ranks in every.items() if ranks.size() > 1}
    movers = {name: transport.of(part.get_group().group_name, device).name for name, part in wide.items()}
    found: list[Site] = []
    if TENSOR in wide:
        world, mover = wide[TENSOR].size(), movers[TENSOR]
        apart = branches.modules(model)
        for name, module in model.named_modules():
            if module in apart:
                continue  # exchanges nothing, and half of them are elsewhere
            if (site := _tensor_site(name, module, rows, world, mover)) is not None:
                found.append(site)
        found.append(
            _exposed(
                "replicated gradients", "", "all-reduce", "once a step, after the backward pass is complete"
            )
        )
    if CONTEXT in wide:
        found += [site for name, module in model.named_modules() for site in _context_sites(name, module)]
    if _TOKENS in wide:
        where = "on FSDP2's own stream" if device.type == "cuda" else f"over {movers[_TOKENS]}"
        for name, module in model.named_modules():
            if isinstance(module, FSDPModule):
                found.append(_data_site(name or "model", where, device))
    if wide:
        found.append(_exposed("gradient norm", "", "all-gather", "a few numbers, once a step"))
    if _TOKENS in wide:
        found.append(_exposed("mean loss", "all-gather", "", "one number, once a step"))
    return found


def _tensor_site(name: str, module: nn.Module, rows: int, world: int, mover: str) -> Site | None:
    """What a module exchanges over the tensor dimension; None for one that has nothing to exchange."""
    gather, scatter = "all-gather, then product", "product, then reduce-scatter"
    if transport.settings().keep_gather:
        column_backward = f"{scatter}; weight gradient from the gather that was kept"
    else:
        column_backward = f"{scatter}; all-gather, then weight gradient"
    match module:
        case tensor.VocabularyParallelHeadLinear():
            exchanged = f"{gather}, then three numbers a row; the gradients too"
            backward = f"in the forward pass: {scatter}, under the weight gradient"
            return _product(name, _sizes(module), exchanged, backward, rows, world, mover)
        case tensor.ColumnParallelLinear():
            return _product(name, _sizes(module), gather, column_backward, rows, world, mover)
        case tensor.RowParallelLinear():
            backward = f"{gather}, which serves the weight gradient too"
            return _product(name, _sizes(module), scatter, backward, rows, world, mover)
        case tensor.VocabularyParallelEmbedding():
            return _exposed(name, "reduce-scatter", "all-gather", "a look-up: there is no product beside it")
        case ssm.SSMHeadsMixer():
            return _product(name, module.sizes(), gather, column_backward, rows, world, mover)
        case ssm.SummedLinear():
            return _exposed(name, "product, then all-reduce", "all-reduce", "a few columns, of all channels")
        case ssm.RowRouting():
            return _exposed(name, "all-gather, twice", "reduce-scatter, twice", "it moves rows alone")
        case branches.BranchRouting() | branches.BranchesBeside():
            why = "branches begin with all their rows and end together"
            return _exposed(name, "all-gather, reduce-scatter", "all-gather, reduce-scatter", why)
        case nn.Linear() | nn.Embedding():
            return Site(name, "", "", "", False, "whole on every rank, on its own rows alone")
    return None


def _context_sites(name: str, module: nn.Module) -> list[Site]:
    """What a module exchanges over the context dimension."""
    match module:
        case SegmentAttention():
            what, why = "keys and values", "attention begins with all of them"
        case StatePassingMixer():
            what, why = "states and the convolution's last tokens", "they do not grow with the sequence"
        case _:
            return []
    return [_exposed(f"{name} (context)", f"all-gather of {what}", "reduce-scatter of their gradients", why)]


def _sizes(module: nn.Linear) -> tuple[int, int]:
    return module.in_features, module.out_features


def _product(
    name: str, sizes: tuple[int, int], forward: str, backward: str, rows: int, world: int, mover: str
) -> Site:
    inputs, outputs = sizes
    product = f"[{rows}, {inputs}] x [{inputs}, {outputs}]"
    if rows < world:
        why = f"{rows} rows over {world} ranks: some have no chunk to compute"
        return Site(name, product, forward, backward, False, why)
    chunks = f"{world} chunks of {rows // world} rows" + (" or one more" if rows % world else "")
    subchunks = transport.settings().subchunks
    cut = f", each in {subchunks} pieces" if subchunks > 1 else ""
    return Site(name, product, forward, backward, True, f"{chunks}{cut}, moved by {mover}")


def _data_site(name: str, where: str, device: torch.device) -> Site:
    forward, backward = "all-gather of parameters", "all-gather of parameters; reduce-scatter of gradients"
    if device.type == "cuda":
        return Site(f"{name} (data)", "", forward, backward, True, f"{where}, beside the block before it")
    why = f"{where}; FSDP2 waits for it: the CPU has no second stream"
    return Site(f"{name} (data)", "", forward, backward, False, why)


def _exposed(name: str, forward: str, backward: str, why: str) -> Site:
    return Site(name, "", forward, backward, False, why)
