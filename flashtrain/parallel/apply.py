"""Apply parallelism to a plain model: ``parallelize(model, mesh, plan)``."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import ParallelStyle, parallelize_module

from flashtrain.comm import collectives
from flashtrain.errors import UserError
from flashtrain.parallel import branches, context, data, ssm, tensor
from flashtrain.parallel.heads import HeadParallel
from flashtrain.parallel.mesh import CONTEXT, DATA, TENSOR, token_ranks
from flashtrain.parallel.state_passing import StatePassing

# What a layer may do without, so that it is gathered by itself, where it is called.
_APART = ("layers.*.attention.qk", "layers.*.attention.kv")


def decoder_plan(rows: tensor.Rows) -> dict[str, ParallelStyle]:
    """Which module of a decoder gets which style, by name; ``*`` stands for any one part of a name."""
    return {
        "embedding": tensor.VocabularyParallel(rows),
        "layers.*.attention_norm": tensor.SequenceParallel(rows),
        "layers.*.attention.qkv": HeadParallel(rows),
        # Where queries and keys, or keys and values, may be those of another layer.
        "layers.*.attention.qk": tensor.ColumnParallelPacked(rows),
        "layers.*.attention.v": tensor.ColumnParallel(rows),
        "layers.*.attention.kv": tensor.ColumnParallelPacked(rows),
        "layers.*.attention.q": tensor.ColumnParallel(rows),
        "layers.*.attention.cache": tensor.ColumnParallel(rows),
        "layers.*.attention.out": tensor.RowParallel(rows),
        "layers.*.mlp_norm": tensor.SequenceParallel(rows),
        "layers.*.mlp.gate_up": tensor.ColumnParallel(rows),
        "layers.*.mlp.down": tensor.RowParallel(rows),
        **_hybrid_plan(rows),
        "norm": tensor.SequenceParallel(rows),
        "head": tensor.VocabularyParallelHead(rows),
    }


def _hybrid_plan(rows: tensor.Rows) -> dict[str, ParallelStyle]:
    """Layers of one mixer, and FlowHN's, whose branches are lists of such layers."""
    plan: dict[str, ParallelStyle] = {}
    for layer in ("layers.*", "layers.*.attention_branch.*", "layers.*.ssm_branch.*"):
        plan |= {
            f"{layer}.norm": tensor.SequenceParallel(rows),
            f"{layer}.attention.qkv": HeadParallel(rows),
            f"{layer}.attention.out": tensor.RowParallel(rows),
            f"{layer}.mlp.gate_up": tensor.ColumnParallel(rows),
            f"{layer}.mlp.down": tensor.RowParallel(rows),
            f"{layer}.ssm": ssm.SSMHeads(rows),
            f"{layer}.ssm.select": ssm.Summed(rows),
            f"{layer}.ssm.out": tensor.RowParallel(rows),
        }
    # One product from residual stream to residual stream: whole on every rank, on its own rows, it needs
    # no transfer but that of its gradient.
    own_rows = dict.fromkeys(("join", "fuse", "final"), tensor.SequenceParallel(rows))
    plan |= {f"layers.*.{name}": style for name, style in own_rows.items()}
    return plan | {"layers.*.routing": ssm.RowRouted(rows)}


def branch_plan(rows: tensor.Rows) -> dict[str, ParallelStyle]:
    """As ``decoder_plan``, for blocks whose branches are whole on one of two ranks each."""
    of_branches = ("attention", "ssm", "attention_branch", "ssm_branch", "routing")
    plan = {
        name: style
        for name, style in decoder_plan(rows).items()
        if not any(part in of_branches for part in name.split("."))
    }
    for rank, name in enumerate(branches.RANKS):
        plan |= {f"layers.*.{name}{end}": branches.OfRank(rows, rank) for end in ("", "_branch")}
    return plan | {
        "layers.*.routing": branches.RoutedToBranches(rows),
        "layers.*.beside": branches.BesideByBranches(rows),
    }


def context_plan() -> dict[str, ParallelStyle]:
    """What of a decoder mixes tokens, and by which style it reaches beyond a segment."""
    plan: dict[str, ParallelStyle] = {}
    for layer in ("layers.*", "layers.*.attention_branch.*", "layers.*.ssm_branch.*"):
        plan |= {f"{layer}.attention": context.GatherKeys(), f"{layer}.ssm": StatePassing()}
    return plan


def parallelize(
    model: nn.Module,
    mesh: DeviceMesh,
    plan: Mapping[str, ParallelStyle] | None = None,
    units: Sequence[nn.Module] | None = None,
    sharding: data.Sharding | None = None,
    by_branches: bool = False,
) -> nn.Module:
    """Shard ``model`` in place over ``mesh`` with dimensions named ``data``, ``context`` and/or ``tensor``.

    Every rank must hold the same parameters. ``context`` is of decoders, called with this rank's segment of
    the tokens. For the others, ``plan`` maps module names to styles (default: a decoder
    with the names of ``decoder_plan``); ``model(tokens [S, B], ...)`` takes its tokens first. ``units``
    are the blocks that data parallelism gathers one at a time, inner ones first (default: ``model.layers``,
    without projections that a layer may do without, which are units of their own, as are ``model.embedding``
    and ``model.head`` unless they share their weight), ``sharding`` how.
    ``by_branches``: the default plan is ``branch_plan``, for two ranks in ``tensor``. A dimension of degree 1
    changes nothing. Raises UserError for a plan that does not fit the model.
    """
    names = mesh.mesh_dim_names or ()
    if TENSOR in names and mesh[TENSOR].size() > 1:
        rows = tensor.Rows()
        shared = _shared_parameters(model)
        if by_branches:
            branches.check(model, mesh[TENSOR].size())
        default = branch_plan(rows) if by_branches else decoder_plan(rows)
        styles = _matched(model, plan) if plan else _complete(model, default)
        parallelize_module(model, mesh[TENSOR], styles)
        _tie(model, shared)
        for name, module in model.named_modules():
            if isinstance(module, tensor._OverTensorGroup):
                module.site = name

        def note_rows(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            rows.total = inputs[0].numel()

        model.register_forward_pre_hook(note_rows)
    if CONTEXT in names and mesh[CONTEXT].size() > 1:
        _cut_in_segments(model, mesh[CONTEXT])
    if (DATA in names or CONTEXT in names) and token_ranks(mesh).size() > 1:
        found, kept = _units(model) if units is None else (units, ())
        data.shard(model, found, token_ranks(mesh), sharding, branches.absent(model), kept)
    return model


def _cut_in_segments(model: nn.Module, ranks: DeviceMesh) -> None:
    context.place(model, ranks)
    if _named(model, "layers.*.routing"):
        raise UserError(
            "windows of FlowHN are of whole sequences: set parallel.context 1 or model.layout.strategy none"
        )
    styles = {name: style for pattern, style in context_plan().items() for name in _named(model, pattern)}
    parallelize_module(model, ranks, styles)
    for name in styles:
        mixer: Any = model.get_submodule(name)
        mixer.context_site = f"{name} (context)"


def _units(model: nn.Module) -> tuple[Sequence[nn.Module], Sequence[nn.Module]]:
    """What is gathered as one, and what of it stays for the backward pass.

    Blocks are in the order of the forward pass, and what is apart inside of them before all of them.
    Embedding and head are apart, so that a step waits for one at its start and at its end, not for both.
    They stay: the head's backward pass is the next, and the embedding's needs none of it.
    """
    ends = {} if _shared_parameters(model) else dict(model.named_children())
    first, last = ([ends[name]] if name in ends else [] for name in ("embedding", "head"))
    apart = [model.get_submodule(name) for pattern in _APART for name in _named(model, pattern)]
    return [*first, *apart, *model.get_submodule("layers").children(), *last], [*first, *last]


def _shared_parameters(model: nn.Module) -> list[list[str]]:
    """The names of each parameter that has several, as a table that is the output projection too."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return [group for group in names.values() if len(group) > 1]


def _tie(model: nn.Module, shared: Sequence[Sequence[str]]) -> None:
    """Make the parameters of each group one again, since a style makes a new one for its module.

    Raises UserError if styles have sharded them differently.
    """
    for first, *others in shared:
        kept = model.get_parameter(first)
        for name in others:
            module, _, own = name.rpartition(".")
            theirs = model.get_parameter(name)
            if _placements(theirs) != _placements(kept):
                raise UserError(
                    f"{name} and {first} are one parameter, but the parallel plan shards them differently: "
                    "give both the same dimension"
                )
            setattr(model.get_submodule(module), own, kept)


def _placements(parameter: Tensor) -> object:
    return parameter.placements if isinstance(parameter, DTensor) else None


def _matched(model: nn.Module, plan: Mapping[str, ParallelStyle]) -> dict[str, ParallelStyle]:
    matched: dict[str, ParallelStyle] = {}
    for pattern, style in plan.items():
        found = _named(model, pattern)
        if not found:
            raise UserError(f"the parallel plan names {pattern}, but the model has no such module")
        matched |= dict.fromkeys(found, style)
    return matched


def _complete(model: nn.Module, plan: Mapping[str, ParallelStyle]) -> dict[str, ParallelStyle]:
    """The part of ``plan`` that ``model`` has. Raises UserError for a weight matrix that no pattern names.

    Such a one would be whole on every rank and see this rank's rows alone.
    """
    styles = {name: style for pattern, style in plan.items() for name in _named(model, pattern)}
    whole = tuple(f"{name}." for name, style in styles.items() if isinstance(style, branches.OfRank))
    for name, module in model.named_modules():
        if name.startswith(whole):
            continue
        if isinstance(module, nn.Linear | nn.Embedding) and name not in styles:
            raise UserError(f"{name} has no style among those of decoder_plan: give parallelize a plan")
    return styles


def _named(model: nn.Module, pattern: str) -> list[str]:
    parts = pattern.split(".")
    return [
        name
        for name, _ in model.named_modules()
        if len(name.split(".")) == len(parts)
        and all(part in ("*", own) for part, own in zip(parts, name.split("."), strict=True))
    ]


def is_tensor_sharded(parameter: Tensor) -> bool:
    """Whether ranks of the tensor dimension hold different parts of ``parameter``."""
    if not isinstance(parameter, DTensor) or TENSOR not in (parameter.device_mesh.mesh_dim_names or ()):
        return False
    placement = parameter.placements[parameter.device_mesh.mesh_dim_names.index(TENSOR)]  # type: ignore[union-attr]
    return isinstance(placement, Shard) or placement.is_shard()


def tensor_sharded(model: nn.Module) -> frozenset[str]:
    """Names of the parameters of which ranks of the tensor dimension hold different parts.

    Those of branches are among them: one rank holds all of such a one.
    """
    sharded = {name for name, parameter in model.named_parameters() if is_tensor_sharded(parameter)}
    return frozenset(sharded | branches.owned(model))


def sum_replicated_gradients(model: nn.Module, mesh: DeviceMesh) -> None:
    """Add up, over the tensor dimension, the gradients that saw only this rank's rows: one all-reduce.

    Call it after the last backward pass of a step, before clipping. It changes the gradients of
    parameters that are not tensor-sharded, in place, to the same bits on every rank of the dimension.
    """
    sharded = tensor_sharded(model)
    partial = [p.grad for name, p in model.named_parameters() if p.grad is not None and name not in sharded]
    sum_over_tensor([g.to_local() if isinstance(g, DTensor) else g for g in partial], mesh)


def sum_over_tensor(partial: Sequence[Tensor], mesh: DeviceMesh) -> None:
    """Add up ``partial`` over the ranks of the tensor dimension, in place, as one all-reduce."""
    if TENSOR not in (mesh.mesh_dim_names or ()) or mesh[TENSOR].size() == 1 or not partial:
        return
    group = mesh[TENSOR].get_group().group_name
    flat = torch.cat([gradient.reshape(-1) for gradient in partial])
    summed = collectives.all_reduce(flat, group, "replicated gradients")
    totals = summed.split([g.numel() for g in partial])
    torch._foreach_copy_(list(partial), [total.view_as(g) for g, total in zip(partial, totals, strict=True)])
