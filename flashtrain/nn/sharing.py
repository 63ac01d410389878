"""Which layers share attention heads, and with which others: settings, and what follows from them."""

from dataclasses import dataclass
from typing import Literal

from flashtrain.errors import UserError
from flashtrain.kernels.shared_attention.config import refusal
from flashtrain.nn.attend import Heads
from flashtrain.nn.region import Share

PREDECESSOR, INTERVAL = "region_predecessor", "interval:"


@dataclass(frozen=True, kw_only=True)
class Sharing:
    """Which layers may share what with which. ``Decoder.share`` says how many of them do; first, all do.

    ``share``: queries and keys, or keys and values. ``targets``: the layers, counted from 0, that may take
    them over; they begin to with the last. Empty: the second half. ``source``: where from.

    * ``region_predecessor``: the nearest layer before that computes its own, for a whole region one layer.
    * ``interval:N``: the last layer whose number N divides (CLA); the targets are all others.
    * a map such as ``0_0_2_2``: layer by layer the number of its source (LCKV's ``layer_types``).

    ``kv_origin``: ``layer``, what is shared are the source's own heads; ``fresh`` (YOCO), keys and values
    that a projection of their own, ``cache``, makes of the source's normed input. The source keeps its own.

    ``init``: with what weights a source begins to hand over. ``copy``: its own. ``mean`` (as LCKV converts
    models, arXiv 2405.10637): the mean of those that its layers used until then, its own included. That is,
    with a schedule, at each switch that gives a source more layers; without one once, where weights of a
    model that did not share are taken over. A ``fresh`` cache begins so, too; it is drawn at random if there
    are none to take over.

    ``grad_to_source``: gradients of the sharing layers reach the source's projections. ``deferred``: form the
    gradients of shared queries and keys once, at the source. None: where that is the faster way.
    """

    share: Share = "QK"
    targets: tuple[int, ...] = ()
    source: str = PREDECESSOR
    kv_origin: Literal["layer", "fresh"] = "layer"
    init: Literal["copy", "mean"] = "copy"
    grad_to_source: bool = True
    deferred: bool | None = None

    def defers(self, heads: Heads) -> bool:
        """Whether gradients of the shared ``heads`` are formed once."""
        if self.share == "KV" or self.deferred is not None:
            return bool(self.deferred)
        query, key, _ = heads
        # Measured on an H200 (benchmarks/sharing.py): 1.15 times as fast as layer by layer for 32 heads of
        # 64, 0.91 with 4 KV heads, 0.96 for heads of 128. A CPU forms them from whole matrices of scores.
        fits = query.shape[1] == key.shape[1] and query.shape[3] <= 64
        return query.is_cuda and fits and refusal(query.dtype, query.shape[3]) is None

    def validate(self, layers: int) -> None:
        """Raise UserError for targets or sources that a model of ``layers`` layers does not have."""
        if self.share == "KV" and self.deferred:
            raise UserError("model.sharing.deferred is of QK alone: with KV each layer has other scores")
        if self.kv_origin == "fresh" and self.share == "QK":
            raise UserError("model.sharing.kv_origin is fresh, a cache of keys and values: set share KV")
        if self.kv_origin == "fresh" and not self.grad_to_source:
            raise UserError("model.sharing.kv_origin is fresh: set grad_to_source, which trains it")
        if self.source == PREDECESSOR:
            targets = self.targets_of(layers)
            if not targets:
                raise UserError(f"model.layers is {layers}; at least 2 are needed for one to share")
            for one, after in zip(targets, (*targets[1:], layers), strict=True):
                if not 1 <= one < after:
                    raise UserError(
                        f"model.sharing.targets has layer {one}; they must ascend, from 1 to {layers - 1}"
                    )
            return
        if self.targets:
            raise UserError(f"model.sharing.source {self.source} says who shares: leave out sharing.targets")
        given = self._map(layers)
        if len(given) != layers:
            raise UserError(f"model.sharing.source names {len(given)} layers; model.layers is {layers}")
        for layer, source in enumerate(given):
            if not (0 <= source <= layer and given[source] == source):
                raise UserError(
                    f"model.sharing.source gives layer {layer} layer {source}, which is not one before it "
                    "that computes its own"
                )
        if not self.targets_of(layers):
            raise UserError(f"model.sharing.source {self.source} lets no layer share")

    def targets_of(self, layers: int) -> tuple[int, ...]:
        """The layers that may share, ascending."""
        if self.source == PREDECESSOR:
            return self.targets or tuple(range(layers - layers // 2, layers))
        return tuple(layer for layer, source in enumerate(self._map(layers)) if source != layer)

    def sources(self, layers: int, count: int) -> tuple[int, ...]:
        """For each layer the one whose heads it uses, its own number if it computes them itself.

        The last ``count`` targets share. Raises UserError if there are not as many.
        """
        targets = self.targets_of(layers)
        if not 0 <= count <= len(targets):
            raise UserError(f"{count} layers cannot share: 0 to {len(targets)} can")
        found = list(range(layers))
        given = None if self.source == PREDECESSOR else self._map(layers)
        for layer in targets[len(targets) - count :]:
            found[layer] = found[layer - 1] if given is None else given[layer]
        return tuple(found)

    @property
    def sources_apart(self) -> bool:
        """Whether sources, too, have what is shared in a projection apart, with rows as in all others."""
        return self.init == "mean" or self.kv_origin == "fresh"

    def means(self, layers: int, before: int, count: int) -> dict[int, tuple[int, ...]]:
        """Sources that hand over to more layers when, after ``before``, ``count`` targets share.

        For each the layers whose projections its own become the mean of: what each of its users used until
        then. So, without training in between, layers that begin to share one after the other end with the
        mean that all at once would have. Empty if all stay as they are.
        """
        if count <= before or not self.sources_apart:
            return {}
        old, new = self.sources(layers, before), self.sources(layers, count)
        found = {}
        for source in sorted(set(new)):
            users = [layer for layer in range(layers) if new[layer] == source]
            if any(old[user] != source for user in users):
                found[source] = (source,) if self.init == "copy" else tuple(old[user] for user in users)
        return found

    def _map(self, layers: int) -> tuple[int, ...]:
        if self.source.startswith(INTERVAL):
            step = self.source.removeprefix(INTERVAL)
            if not step.isdecimal() or int(step) < 2:
                raise UserError(f"model.sharing.source is {self.source}; the interval must be at least 2")
            return tuple(layer - layer % int(step) for layer in range(layers))
        words = self.source.split("_")
        if not all(word.isdecimal() for word in words):
            raise UserError(
                f"model.sharing.source is {self.source}; it must be {PREDECESSOR}, {INTERVAL}N or one layer "
                "number for each layer, as 0_0_2_2"
            )
        return tuple(map(int, words))
