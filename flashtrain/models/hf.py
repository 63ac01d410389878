"""Llama, Mistral and Qwen2 checkpoints of Hugging Face, and the decoder: configs and weights, both ways.

The decoder turns the halves of a head against each other in rotary positions, as these checkpoints do, so
no row changes its place inside a head. What differs is the packing: the decoder has one weight for Q, K
and V and one for gate and up, in which heads, or blocks of rows, take turns.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from flashtrain.errors import UserError
from flashtrain.models.decoder import Decoder
from flashtrain.nn.mlp import PACKING
from flashtrain.nn.rotary import Llama3Scaling

TABLE, HEAD = "model.embed_tokens.weight", "lm_head.weight"


class _Demand(NamedTuple):
    """What a key of config.json means where it is absent, and the values that the decoder computes."""

    absent: Any
    computed: tuple[Any, ...]


_CLASSES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM"}
_OF_ALL = {
    "hidden_act": _Demand("silu", ("silu", "swish")),
    "attention_dropout": _Demand(0.0, (0.0,)),
    "partial_rotary_factor": _Demand(None, (None, 1.0)),
    "quantization_config": _Demand(None, (None,)),
}
_DEMANDS = {
    "llama": _OF_ALL | {"attention_bias": _Demand(False, (False,)), "mlp_bias": _Demand(False, (False,))},
    "mistral": _OF_ALL | {"sliding_window": _Demand(4096, (None,))},
    "qwen2": _OF_ALL | {"use_sliding_window": _Demand(False, (False,))},
}
_SIZES = {
    "vocabulary": "vocab_size",
    "hidden": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "mlp_width": "intermediate_size",
}
_SCALING = tuple(Llama3Scaling.__dataclass_fields__)


def config_from_hf(content: Mapping[str, Any], where: str) -> Decoder.Config:
    """The decoder that computes what ``content``, a config.json, says.

    Raises UserError that starts with ``where`` and names the key that is missing, is malformed, or asks
    for something that the decoder does not compute.
    """
    kind = content.get("model_type")
    if kind not in _CLASSES:
        raise UserError(f"{where}: model_type is {kind!r}; what can be converted is {', '.join(_CLASSES)}")
    for key, demand in _DEMANDS[kind].items():
        if (value := content.get(key, demand.absent)) not in demand.computed:
            computed = " or ".join(map(repr, demand.computed))
            raise UserError(f"{where}: {key} is {value!r}; the decoder computes only {computed}")
    if set(content.get("layer_types") or ()) - {"full_attention"}:
        raise UserError(
            f"{where}: layer_types names others than 'full_attention', all that the decoder computes"
        )
    present = dict(content)
    if kind == "llama" and present.get("num_key_value_heads") is None:
        present["num_key_value_heads"] = present.get("num_attention_heads")
    sizes = {ours: _number(present, theirs, where, int) for ours, theirs in _SIZES.items()}
    theta, scaling = _rope(content, where)
    config = Decoder.Config(
        **sizes,
        rope_theta=theta,
        rope_scaling=scaling,
        norm_epsilon=_number({"rms_norm_eps": 1e-6, **content}, "rms_norm_eps", where, float),
        qkv_bias=kind == "qwen2",
        tied_embeddings=_flag(content, "tie_word_embeddings", where),
    )
    try:
        config.validate()
    except UserError as error:
        raise UserError(f"{where}: {_in_their_words(str(error))}") from None
    if content.get("head_dim") not in (None, config.head_dim):
        raise UserError(
            f"{where}: head_dim is {content['head_dim']!r}; the decoder's is hidden_size / "
            f"num_attention_heads, {config.head_dim}"
        )
    return config


def context_from_hf(content: Mapping[str, Any], where: str) -> int:
    """How many tokens ``content``, a config.json, is made for. Raises UserError if it is no number."""
    return _number({"max_position_embeddings": 2048, **content}, "max_position_embeddings", where, int)


def config_to_hf(
    config: Decoder.Config, dtype: str, context: int, carried: Mapping[str, Any]
) -> dict[str, Any]:
    """The config.json of ``config`` for transformers: ``carried`` with what ``config`` decides put right.

    If ``carried`` is empty it is that of a Llama, or a Qwen2 if there are biases, for sequences of
    ``context`` tokens. ``dtype`` is that of the weights, without ``torch.``. Raises UserError if
    ``carried`` is of a model that cannot be like ``config``.
    """
    _refuse_layout(config)
    content = dict(carried) or _fresh(config, context)
    for key in ("rope_parameters", "dtype"):
        content.pop(key, None)
    scaling = config.rope_scaling
    content |= {theirs: getattr(config, ours) for ours, theirs in _SIZES.items()}
    content |= {
        "head_dim": config.head_dim,
        "rms_norm_eps": config.norm_epsilon,
        "tie_word_embeddings": config.tied_embeddings,
        # The names that versions 4 and 5 of transformers read alike.
        "rope_theta": config.rope_theta,
        "rope_scaling": None if scaling is None else {"rope_type": "llama3", **vars(scaling)},
        "torch_dtype": dtype,
    }
    where = "the config.json that came with the weights"
    if config_from_hf(content, where) != config:
        raise UserError(f"{where} is of another model: a {content['model_type']} cannot be like {config}")
    return content


def _refuse_layout(config: Decoder.Config) -> None:
    if config.layout is not None:
        raise UserError(
            f"model.layout is a {type(config.layout).__qualname__}; only models without one can be converted"
        )


def _fresh(config: Decoder.Config, context: int) -> dict[str, Any]:
    kind = "qwen2" if config.qkv_bias else "llama"
    return {
        "architectures": [_CLASSES[kind]],
        "model_type": kind,
        "hidden_act": "silu",
        "max_position_embeddings": context,
        # Absent, they would be ids that mean something else in this vocabulary.
        "bos_token_id": None,
        "eos_token_id": None,
    }


@dataclass(frozen=True)
class Weight:
    """One parameter of the decoder, and the tensors of the checkpoint that it packs.

    Its rows are ``turns`` times one after the other ``slots[i] · inner`` rows of each part i: heads or
    blocks that take turns. ``rest`` are the sizes of the other dimensions.
    """

    name: str
    parts: tuple[str, ...]
    turns: int
    slots: tuple[int, ...]
    inner: int
    rest: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the parameter."""
        return (self.turns * sum(self.slots) * self.inner, *self.rest)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the parts, by name."""
        return {
            part: (self.turns * slots * self.inner, *self.rest)
            for part, slots in zip(self.parts, self.slots, strict=True)
        }

    def views(self, parameter: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Each part's name and its place ``[turns, slots, inner, ...]`` in ``parameter [rows, ...]``.

        A place shares memory with the parameter; a part reshaped to it has its elements in order.
        """
        packed = parameter.view(self.turns, sum(self.slots), self.inner, *self.rest)
        yield from zip(self.parts, packed.split(self.slots, dim=1), strict=True)


def weights(config: Decoder.Config) -> list[Weight]:
    """All parameters of the decoder in the order in which it computes; each part occurs once.

    Raises UserError for a decoder with pairs of heads or layers that share, which transformers does not have.
    """
    _refuse_layout(config)
    if config.pairing is not None:
        raise UserError(
            f"model.pairing {config.pairing} has no model of transformers; what model.kv_heads says has"
        )
    if config.sharing is not None:
        raise UserError("model.sharing has no model of transformers: this model cannot be exported")
    hidden, head = config.hidden, config.head_dim

    def plain(ours: str, theirs: str, rows: int, *rest: int) -> Weight:
        return Weight(ours, (theirs,), 1, (1,), rows, rest)

    found = [plain("embedding.weight", TABLE, config.vocabulary, hidden)]
    for index in range(config.layers):
        ours, theirs = f"layers.{index}", f"model.layers.{index}"
        group = config.heads // config.kv_heads
        for kind, rest in (("weight", (hidden,)), ("bias", ())):
            if kind == "weight" or config.qkv_bias:
                parts = tuple(f"{theirs}.self_attn.{one}_proj.{kind}" for one in "qkv")
                packed = f"{ours}.attention.qkv.{kind}"
                found.append(Weight(packed, parts, config.kv_heads, (group, 1, 1), head, rest))
        gate_up = tuple(f"{theirs}.mlp.{one}_proj.weight" for one in ("gate", "up"))
        found += [
            plain(f"{ours}.attention_norm.weight", f"{theirs}.input_layernorm.weight", hidden),
            plain(f"{ours}.attention.out.weight", f"{theirs}.self_attn.o_proj.weight", hidden, hidden),
            plain(f"{ours}.mlp_norm.weight", f"{theirs}.post_attention_layernorm.weight", hidden),
            Weight(
                f"{ours}.mlp.gate_up.weight", gate_up, config.mlp_width // PACKING, (1, 1), PACKING, (hidden,)
            ),
            plain(f"{ours}.mlp.down.weight", f"{theirs}.mlp.down_proj.weight", hidden, config.mlp_width),
        ]
    found.append(plain("norm.weight", "model.norm.weight", hidden))
    if not config.tied_embeddings:
        found.append(plain("head.weight", HEAD, config.vocabulary, hidden))
    return found


def is_recomputed(name: str) -> bool:
    """Whether a tensor is computed anew when it is loaded: the frequencies that old versions stored."""
    return name.endswith(".rotary_emb.inv_freq")


def _rope(content: Mapping[str, Any], where: str) -> tuple[float, Llama3Scaling | None]:
    """Base and scaling, as transformers 5 writes them (rope_parameters) or as those before did."""
    key = "rope_parameters" if content.get("rope_parameters") is not None else "rope_scaling"
    given = content.get(key) or {}
    if not isinstance(given, dict):
        raise UserError(f"{where}: {key} is {given!r}; expected an object")
    theta = _number(
        {"rope_theta": given.get("rope_theta", content.get("rope_theta", 10_000.0))},
        "rope_theta",
        where,
        float,
    )
    kind = given.get("rope_type", given.get("type", "default"))
    if given.get("partial_rotary_factor", 1.0) != 1.0:
        value = given["partial_rotary_factor"]
        raise UserError(f"{where}: {key}.partial_rotary_factor is {value!r}; the decoder computes only 1.0")
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise UserError(
            f"{where}: {key}.rope_type is {kind!r}; the decoder computes only 'default' and 'llama3'"
        )
    named = {f"{key}.{name}": given[name] for name in _SCALING if name in given}
    fields: dict[str, Any] = {
        name: _number(named, f"{key}.{name}", where, int if name == _SCALING[-1] else float)
        for name in _SCALING
    }
    return theta, Llama3Scaling(**fields)


def _number(content: Mapping[str, Any], key: str, where: str, kind: type) -> Any:
    if key not in content:
        raise UserError(f"{where}: it has no {key}; is it the config.json of a whole model?")
    value = content[key]
    if isinstance(value, bool) or not isinstance(value, int if kind is int else int | float):
        raise UserError(f"{where}: {key} is {value!r}; expected {'a whole' if kind is int else 'a'} number")
    return kind(value)


def _flag(content: Mapping[str, Any], key: str, where: str) -> bool:
    value = content.get(key, False)
    if not isinstance(value, bool):
        raise UserError(f"{where}: {key} is {value!r}; expected true or false")
    return value


def _in_their_words(message: str) -> str:
    """A complaint about the decoder's config in the keys of a config.json."""
    words = [(f"model.{ours}", theirs) for ours, theirs in _SIZES.items()]
    for ours, theirs in (*words, ("model.norm_epsilon", "rms_norm_eps"), ("model.rope_", "rope_")):
        message = message.replace(ours, theirs)
    return message
