"""Runs whose layers begin to share: switched off the plain run, resumed the unbroken one, on every mesh."""

import shutil
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from flashtrain.comm import transport
from flashtrain.data import Corpus
from flashtrain.errors import UserError
from flashtrain.methods.callback import Run
from flashtrain.methods.progressive_sharing import ProgressiveSharing
from flashtrain.models import hf
from flashtrain.models.decoder import Decoder
from flashtrain.nn.shared_attention import SwitchableAttention
from flashtrain.nn.sharing import Sharing
from flashtrain.parallel.data import Sharding
from flashtrain.parallel.mesh import DATA, Degrees
from flashtrain.recipes import RECIPES
from flashtrain.train import snapshot
from flashtrain.train.optimizer import AdamW
from flashtrain.train.settings import Training
from flashtrain.train.trainer import Trainer
from tests.distributed import run_distributed
from tests.train.runs import metrics, train, trajectory, write_text

QK, KV = Sharing(targets=(1, 2, 3)), Sharing(share="KV", targets=(1, 2, 3))
FRESH = replace(KV, kv_origin="fresh", targets=(2, 3))
MEANS = [replace(way, init="mean") for way in (QK, KV)]
NEVER, SOON = ProgressiveSharing.Config(interval=1000), ProgressiveSharing.Config(interval=1)
STEPS = 5  # with SOON 0, 1, 2, 3, 3 layers share


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "text.txt")


def config(text: Path, tensor: int = 1, data: int = 1, **changes: Any) -> Trainer.Config:
    """A tiny run; its gradients are clipped in every step."""
    made = Trainer.Config(
        model=Decoder.Config(hidden=64, layers=4, heads=8, kv_heads=4, mlp_width=256),
        data=Corpus.Config(source=str(text)),
        train=Training(steps=STEPS, batch=4, sequence=30, evaluation_windows=8),
        optimizer=AdamW.Config(learning_rate=1e-2, warmup=2, clip_norm=0.1),
        parallel=Degrees(tensor=tensor, data=data),
        comm=transport.Settings(timeout=60),
    )
    return replace(made, **changes)


def shared(text: Path, sharing: Sharing, schedule: Any, *degrees: int) -> Trainer.Config:
    plain = config(text, *degrees)
    return replace(plain, model=replace(plain.model, sharing=sharing), sharing=schedule)


class Steps:
    """A trainer that takes steps one at a time, from the latest checkpoint in ``out`` if there is one."""

    def __init__(self, settings: Trainer.Config, out: str = "unused") -> None:
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = True
        transport.configure(settings.comm)
        self.trainer = Trainer(settings, Path(out))
        self.trainer._build(torch.device("cpu"))
        self.next, states = self.trainer._resume()
        self.callback = None
        if settings.sharing is not None:
            self.callback = ProgressiveSharing(
                settings.sharing, self.trainer.model, self.trainer.set_to_means
            )
            self.callback.load_state_dict(states.get("ProgressiveSharing", {}))
            self.callback.on_start(Run(Path(out), self.next, STEPS, "", ""))

    def take(self, count: int) -> list[tuple[float, float]]:
        """Losses and gradient norms of ``count`` steps."""
        found = []
        for step in range(self.next, self.next + count):
            if self.callback is not None:
                self.callback.before_step(step)
            rate = self.trainer.config.optimizer.learning_rate_at(step, STEPS)
            result = self.trainer.step(step, rate, self.trainer.batches.of(step))
            found.append((result.loss, result.grad_norm))
        self.next += count
        return found

    def save(self) -> None:
        trainer, states = self.trainer, {}
        if self.callback is not None:
            states["ProgressiveSharing"] = self.callback.state_dict()
        snapshot.save(trainer.store, self.next - 1, trainer.model, trainer.optimizer, trainer.config, states)

    def tensors(self) -> dict[str, Tensor]:
        """Weights, moments and masters, whole."""
        found = dict(self.trainer.model.named_parameters()) | self.trainer.optimizer.state()
        return {
            name: (t.full_tensor() if isinstance(t, DTensor) else t).detach().clone()
            for name, t in found.items()
        }


def packed(tensors: dict[str, Tensor], like: dict[str, Tensor], model: Decoder) -> list[str]:
    """Names in which ``tensors``, of a model that may share, differ from ``like``, those of a plain one."""
    apart = {f"{name}.qkv": m for name, m in model.named_modules() if isinstance(m, SwitchableAttention)}
    wanted: dict[str, Tensor] = {}
    for name, whole in like.items():
        prefix, _, kind = name.partition(".weight")
        if prefix in apart:
            place = prefix.removesuffix("qkv")
            pieces = apart[prefix].pieces(whole)
            wanted |= {f"{place}{piece}.weight{kind}": rows for piece, rows in pieces.items()}
        else:
            wanted[name] = whole
    assert wanted.keys() == tensors.keys()
    return [name for name, tensor in wanted.items() if not torch.equal(tensors[name], tensor)]


def _switched_off(rank: int, world: int, plain: Trainer.Config, others: list[Trainer.Config]) -> list[str]:
    failures = []
    for dtype in ("float32", "bfloat16"):
        narrow = [replace(one, train=replace(one.train, dtype=dtype)) for one in (plain, *others)]
        baseline = Steps(narrow[0])
        wanted, weights = baseline.take(2), baseline.tensors()
        for other in narrow[1:]:
            steps = Steps(other)
            if (found := steps.take(2)) != wanted:
                failures.append(f"{other.model.sharing}: {found} instead of {wanted}")
            failures += packed(steps.tensors(), weights, steps.trainer.model)
    return failures


@pytest.mark.parametrize("degrees", [(1, 1), (2, 1), (1, 2)])
def test_before_the_first_switch_it_is_the_plain_run_to_the_bit(text: Path, degrees: tuple[int, int]) -> None:
    """Losses, gradient norms, and after clipped steps weights and moments."""
    others = [shared(text, way, NEVER, *degrees) for way in (QK, KV)]
    world = degrees[0] * degrees[1]
    assert run_distributed(_switched_off, world, config(text, *degrees), others) == [[]] * world


def every_kind(text: Path, *degrees: int) -> list[Trainer.Config]:
    runs = [shared(text, way, SOON, *degrees) for way in (QK, KV, MEANS[1])]
    return [*runs, shared(text, FRESH, None, *degrees)]


def _trajectories(rank: int, world: int, settings: list[Trainer.Config]) -> list[list[tuple[float, float]]]:
    return [Steps(one).take(STEPS) for one in settings]


@pytest.fixture(scope="module")
def one_rank(text: Path) -> list[list[tuple[float, float]]]:
    return run_distributed(_trajectories, 1, every_kind(text))[0]


@pytest.mark.parametrize("degrees", [(2, 1), (1, 2), (2, 2)])
def test_regions_over_many_ranks_train_as_on_one(
    text: Path, one_rank: list[list[tuple[float, float]]], degrees: tuple[int, int]
) -> None:
    assert one_rank[1] != one_rank[2], "init mean makes no difference"
    for runs in run_distributed(_trajectories, degrees[0] * degrees[1], every_kind(text, *degrees)):
        for losses, alone in zip(runs, one_rank, strict=True):
            for step, ((loss, norm), (wanted, wanted_norm)) in enumerate(zip(losses, alone, strict=True), 1):
                assert loss == pytest.approx(wanted, rel=1e-4), step
                assert norm == pytest.approx(wanted_norm, rel=1e-3), step


def _broken(
    rank: int, world: int, settings: Trainer.Config, other: Trainer.Config, out: str
) -> dict[str, Any]:
    """A run of all steps, and one that is saved before a switch and goes on: there, and on another mesh."""
    unbroken = Steps(settings)
    wanted = unbroken.take(STEPS)
    first = Steps(settings, out)
    found = first.take(2)
    first.save()
    second = Steps(settings, out)
    counts = first.callback.shared, second.callback.shared
    found += second.take(STEPS - 2)
    one, two = unbroken.tensors(), second.tensors()
    elsewhere = Steps(other, out)
    moved = [name for name, t in first.tensors().items() if not torch.equal(elsewhere.tensors()[name], t)]
    return {
        "trajectory": found == wanted,
        "tensors": [name for name in one if not torch.equal(one[name], two[name])],
        "counts": counts,
        "moved": moved,
        "elsewhere": [abs(a - b) for (a, _), (b, _) in zip(elsewhere.take(2), wanted[2:4], strict=True)],
    }


@pytest.mark.parametrize(
    ("sharing", "degrees", "others"),
    [(QK, (1, 2), (2, 1)), (MEANS[1], (2, 1), (1, 2)), (MEANS[0], (1, 2), (2, 1))],
)
def test_resuming_across_a_switch_gives_the_bits_of_the_unbroken_run(
    text: Path, tmp_path: Path, sharing: Sharing, degrees: tuple[int, int], others: tuple[int, int]
) -> None:
    settings, other = (shared(text, sharing, SOON, *each) for each in (degrees, others))
    for found in run_distributed(_broken, 2, settings, other, str(tmp_path)):
        assert found["counts"] == (1, 1), "the second layer's turn is in the next step"
        assert found["trajectory"]
        assert found["tensors"] == found["moved"] == []
        assert max(found["elsewhere"]) < 1e-3


def _left_out(rank: int, world: int, settings: Trainer.Config, unused: str) -> list[str]:
    """What happens to projections that no step uses: not gathered, updated or decayed; and no warning."""
    warnings.simplefilter("error", UserWarning)
    failures = []
    steps = Steps(settings)
    mover = transport.of(steps.trainer.mesh[DATA].get_group().group_name, torch.device("cpu"))
    real, gathered = mover.open, []

    def open(schedule: Any, site: str) -> Any:
        gathered.append(site)
        return real(schedule, site)

    mover.open = open
    for layers in (0, 1, 3):
        while steps.callback.config.shared_at(steps.next, 3) < layers:
            steps.take(1)
        before = steps.tensors()
        gathered.clear()
        steps.take(1)
        after = steps.tensors()
        for layer in (1, 2, 3):
            name = f"layers.{layer}.attention.{unused}"
            used = layer < 4 - layers
            if (f"{name} (data)" in gathered) != used:
                failures.append(f"{layers} share, and {name} was {'not ' * used}gathered")
            kinds = [n for n in after if n.startswith(f"{name}.")]
            if len(kinds) != 3:
                failures.append(f"{name} has {kinds}")
            for kind in kinds:
                if torch.equal(before[kind], after[kind]) == used:
                    failures.append(f"{layers} share, and {kind} {'did not move' if used else 'moved'}")
    return failures


@pytest.mark.parametrize(("sharing", "unused", "tensor", "prefetch"), [(QK, "qk", 1, 1), (KV, "kv", 2, 2)])
def test_unused_projections_are_neither_gathered_nor_decayed(
    text: Path, sharing: Sharing, unused: str, tensor: int, prefetch: int
) -> None:
    settings = replace(shared(text, sharing, SOON, tensor, 2), fsdp=Sharding(prefetch=prefetch))
    assert run_distributed(_left_out, 2 * tensor, settings, unused) == [[]] * 2 * tensor


def _from_packed(rank: int, world: int, plain: Trainer.Config, other: Trainer.Config, out: str) -> list[str]:
    first = Steps(plain, out)
    first.take(1)
    first.callback = ProgressiveSharing(SOON, Decoder(other.model), lambda means: None)
    first.save()
    loaded = Steps(replace(other, train=replace(other.train, init_from=Path(out))), out + "-other")
    weights = {n: t for n, t in first.tensors().items() if n in dict(first.trainer.model.named_parameters())}
    like = weights | {f"{n}.{m}": torch.zeros_like(t) for n, t in weights.items() for m in
                      ("exp_avg", "exp_avg_sq")}  # fmt: skip
    return packed(loaded.tensors(), like, loaded.trainer.model)


@pytest.mark.parametrize("degrees", [(2, 1), (1, 2)])
def test_a_run_that_shares_starts_from_weights_that_do_not(
    text: Path, tmp_path: Path, degrees: tuple[int, int]
) -> None:
    plain = config(text, *degrees)
    other = shared(text, MEANS[1], SOON, *degrees)  # what it means comes with the first switch
    out = str(tmp_path / "run")
    assert run_distributed(_from_packed, 2, plain, other, out) == [[]] * 2


def _switched(rank: int, world: int, settings: Trainer.Config) -> list[str]:
    """What a switch does to weights, masters and moments, and whether the next step computes with it."""
    failures = []
    unbroken, steps = Steps(settings), Steps(settings)
    wanted = unbroken.take(2)[1:]
    steps.take(1)
    before = steps.tensors()
    steps.trainer.batches.held_out_loss(steps.trainer.model)  # which leaves weights gathered
    steps.callback.before_step(2)
    after = steps.tensors()
    name = f"layers.{{}}.attention.{'qk' if settings.model.sharing.share == 'QK' else 'kv'}.weight"
    masters = [before[f"{name.format(layer)}.master"] for layer in (2, 3)]
    mean = (masters[0] + masters[1]) / 2
    source = name.format(2)
    if not torch.equal(after.pop(f"{source}.master"), mean):
        failures.append("the master is not the mean of both")
    if not torch.equal(after.pop(source), mean.bfloat16()):
        failures.append("the weight is not its rounded master")
    failures += [name for name, tensor in after.items() if not torch.equal(tensor, before[name])]
    if (found := steps.take(1)) != wanted:
        failures.append(f"{found} instead of {wanted}")
    return failures


@pytest.mark.parametrize(("sharing", "degrees"), [(MEANS[0], (1, 1)), (MEANS[1], (2, 1)), (MEANS[1], (1, 2))])
def test_a_switch_sets_weights_and_masters_to_the_mean_and_nothing_else(
    text: Path, sharing: Sharing, degrees: tuple[int, int]
) -> None:
    settings = shared(text, sharing, SOON, *degrees)
    settings = replace(
        settings, train=replace(settings.train, dtype="bfloat16"), fsdp=Sharding(reshard=False)
    )
    world = degrees[0] * degrees[1]
    assert run_distributed(_switched, world, settings) == [[]] * world


def _converted(
    rank: int, world: int, plain: Trainer.Config, others: list[Trainer.Config], out: str
) -> list[str]:
    """Weights of a plain run taken over by runs whose layers share from the first step on."""
    failures = []
    first = Steps(plain, out)
    first.take(1)
    first.save()
    weights, path = first.tensors(), Path(out)
    for number, other in enumerate(others):
        sharing, its_own = other.model.sharing, f"{out}-{number}"
        begun = replace(other, train=replace(other.train, init_from=path))
        steps = Steps(begun, its_own)
        attention = steps.trainer.model.layers[1].attention
        taken = (1, 2, 3) if sharing.init == "mean" else (1,)
        pieces = [attention.pieces(weights[f"layers.{n}.attention.qkv.weight"])["kv"] for n in taken]
        found = steps.tensors()
        name = "cache" if sharing.kv_origin == "fresh" else "kv"
        if not torch.equal(found[f"layers.1.attention.{name}.weight"], sum(pieces) / len(pieces)):
            failures.append(f"{sharing}: not the mean of the weights taken over")
        if name == "cache" and not torch.equal(found["layers.1.attention.kv.weight"], pieces[0]):
            failures.append(f"{sharing}: the source's own weights are not those taken over")
        steps.take(1)
        steps.save()
        again = Steps(begun, its_own).tensors()
        failures += [name for name, t in steps.tensors().items() if not torch.equal(again[name], t)]
        try:
            Steps(replace(other, train=replace(other.train, init_from=Path(its_own))), "unused")
            if sharing.init == "mean":
                failures.append(f"{sharing}: weights that were means are averaged again")
        except UserError as error:
            if sharing.init == "copy" or "share already: set model.sharing.init to copy" not in str(error):
                failures.append(str(error))
    return failures


@pytest.mark.parametrize("degrees", [(2, 1), (1, 2)])
def test_a_conversion_begins_with_the_mean_or_a_copy_once(
    text: Path, tmp_path: Path, degrees: tuple[int, int]
) -> None:
    targets = (2, 3)
    ways = (
        replace(FRESH, targets=targets),
        replace(FRESH, targets=targets, init="mean"),
        replace(MEANS[1], targets=targets),
    )
    others = [shared(text, way, None, *degrees) for way in ways]
    out = str(tmp_path / "run")
    assert run_distributed(_converted, 2, config(text, *degrees), others, out) == [[]] * 2


def test_a_run_counts_fewer_flops_and_goes_on_across_a_switch(text: Path, tmp_path: Path) -> None:
    settings = {
        "model__layers": 4,
        "model__sharing.class": "Sharing",
        "sharing__class": "ProgressiveSharing.Config",
        "sharing__interval": 2,
        "parallel__tensor": 1,
        "train__steps": 5,
        "checkpoint__every": 2,
    }
    done = train(tmp_path / "whole", text, **settings)
    assert done.returncode == 0, done.stderr
    assert "step 3: 1 of 2 layers share" in done.stderr
    flops = [m["tflops_per_s"] / m["tokens_per_s"] for m in metrics(tmp_path / "whole")]
    assert flops[:4] == pytest.approx([flops[0], flops[0], flops[2], flops[2]])
    assert flops[1] > flops[3] > flops[4]

    shutil.copytree(tmp_path / "whole", tmp_path / "broken")
    last, before = sorted((tmp_path / "broken/checkpoints").glob("step-*"), reverse=True)
    shutil.rmtree(last)
    sources = []
    for checkpoint in (before, tmp_path / "whole"):
        model, _ = snapshot.load_model(snapshot.find(checkpoint))
        sources.append([layer.attention.source for layer in model.layers[2:]])
    assert sources == [[2, 2], [1, 1]], "a model is loaded as it was trained"
    assert train(tmp_path / "broken", text, **settings).returncode == 0
    assert trajectory(tmp_path / "broken") == trajectory(tmp_path / "whole")


def test_a_schedule_without_layers_that_may_share_is_refused(text: Path) -> None:
    with pytest.raises(UserError, match=r"set model\.sharing"):
        replace(config(text), sharing=SOON).validate()
    with pytest.raises(UserError, match=r"sharing\.growth 2 must divide"):
        shared(text, QK, replace(SOON, growth=2)).validate()


def test_what_cannot_begin_so_is_refused(text: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"kv_origin is fresh, but the source moves .* leave out sharing"):
        shared(text, FRESH, SOON).validate()
    static = shared(text, MEANS[1], None)
    with pytest.raises(UserError, match=r"init is mean, which is of trained weights: set train\.init_from"):
        static.validate()
    replace(static, train=replace(static.train, init_from=tmp_path)).validate()
    shared(text, MEANS[1], SOON).validate()
    callback = ProgressiveSharing(SOON, Decoder(static.model), lambda means: None)
    for state in ({}, {"shared": 1}):
        callback.load_state_dict(state)
        with pytest.raises(UserError, match=r"after step 3 2 layers share .* keep the schedule"):
            callback.on_start(Run(tmp_path, 4, STEPS, "", ""))
    callback.load_state_dict({"shared": 2})
    callback.on_start(Run(tmp_path, 4, STEPS, "", ""))


def test_what_cannot_be_exported_or_paired_is_refused(text: Path) -> None:
    model = shared(text, QK, SOON).model
    with pytest.raises(UserError, match=r"model\.sharing has no model of transformers"):
        hf.weights(model)
    with pytest.raises(UserError, match=r"leave out model\.sharing"):
        replace(model, pairing="gqa-4").validate()


@pytest.mark.parametrize(("name", "layers"), [("epas", 3), ("echo", 3), ("epas-1b", 11), ("echo-1b", 11)])
def test_recipes_let_half_of_the_layers_share_by_the_end(name: str, layers: int) -> None:
    recipe = RECIPES[name]()
    recipe.validate()
    assert recipe.sharing.shared_at(1, layers) == 0
    assert recipe.sharing.shared_at(recipe.train.steps, layers) == layers
    assert len(recipe.model.sharing.targets_of(recipe.model.layers)) == layers
