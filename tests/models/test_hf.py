"""Hugging Face models and the decoder: the same configs, weights and logits."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from flashtrain.comm import transport
from flashtrain.errors import UserError
from flashtrain.models import hf
from flashtrain.models.decoder import Decoder
from flashtrain.nn.rotary import Llama3Scaling
from flashtrain.parallel import apply, mesh
from flashtrain.train import convert, snapshot
from tests.distributed import run_distributed
from tests.models import tiny_hf

TOLERANCE = 1e-5
CONFIG = Decoder.Config(hidden=64, layers=2, heads=8, kv_heads=2, mlp_width=192)
LLAMA = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
}
SCALING = {"factor": 8, "low_freq_factor": 1, "high_freq_factor": 4, "original_max_position_embeddings": 8192}
LLAMA_8B = Decoder.Config(
    vocabulary=128256, hidden=4096, layers=32, heads=32, kv_heads=8, mlp_width=14336, rope_theta=5e5
)


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Each case as transformers saved it ("hf") and converted ("ft"), in folders below one."""
    folders = {}
    for number, case in enumerate(tiny_hf.CASES):
        folders[case] = tmp_path_factory.mktemp(f"case{number}")
        tiny_hf.save(case, folders[case] / "hf")
        assert len(list((folders[case] / "hf").glob("*.safetensors"))) > 1
        convert.from_hf(folders[case] / "hf", folders[case] / "ft", file_bytes=100_000)
    return folders


@pytest.mark.parametrize("case", tiny_hf.CASES)
def test_logits_are_those_of_transformers(case: str, converted: dict[str, Path]) -> None:
    model, _ = snapshot.load_model(converted[case] / "ft")
    wanted = tiny_hf.logits(converted[case] / "hf", tiny_hf.tokens())
    assert wanted.std() > 0.3, "logits too small to tell anything"
    with torch.no_grad():
        torch.testing.assert_close(model(tiny_hf.tokens()), wanted, rtol=0, atol=TOLERANCE)


def _logits_and_table(rank: int, world: int, folders: list[str]) -> list[tuple[Tensor, Tensor]]:
    """This rank's columns of the logits of each folder's model, and its rows of the table's gradient."""
    transport.configure(transport.Settings(transport="host", timeout=60))
    ranks, found = mesh.build(mesh.Degrees(tensor=world), "cpu"), []
    for folder in folders:
        model = Decoder(snapshot.model_config(Path(folder)))
        apply.parallelize(model, ranks)
        snapshot.load_weights(Path(folder), model)
        logits = model(tiny_hf.tokens())
        model(tiny_hf.tokens(), tiny_hf.tokens().roll(-1, 0)).backward()
        found.append((logits.detach(), model.embedding.weight.grad.to_local()))
    return found


def test_logits_and_gradients_on_two_ranks_are_those_of_transformers(converted: dict[str, Path]) -> None:
    parts = run_distributed(_logits_and_table, 2, [str(folder / "ft") for folder in converted.values()])
    for case, own in zip(converted, zip(*parts, strict=True), strict=True):
        logits = torch.cat([logits for logits, _ in own], dim=-1)
        wanted = tiny_hf.logits(converted[case] / "hf", tiny_hf.tokens())
        torch.testing.assert_close(logits, wanted, rtol=0, atol=TOLERANCE, msg=lambda m, c=case: f"{c}: {m}")

        theirs = tiny_hf.build(case)
        loss = torch.nn.functional.cross_entropy(
            theirs(tiny_hf.tokens().t()).logits.flatten(0, 1), tiny_hf.tokens().roll(-1, 0).t().flatten()
        )
        loss.backward()
        gradient = theirs.get_input_embeddings().weight.grad
        ours = torch.cat([gradient for _, gradient in own])
        torch.testing.assert_close(ours, gradient, rtol=1e-4, atol=1e-6, msg=lambda m, c=case: f"{c}: {m}")


@pytest.mark.parametrize(
    "config",
    [CONFIG, replace(CONFIG, tied_embeddings=True), replace(CONFIG, qkv_bias=True, kv_heads=8)],
)
def test_the_weights_are_all_parameters_of_the_decoder(config: Decoder.Config) -> None:
    with torch.device("meta"):
        parameters = {name: tuple(p.shape) for name, p in Decoder(config).named_parameters()}
    assert {weight.name: weight.shape for weight in hf.weights(config)} == parameters
    parts = [part for weight in hf.weights(config) for part in weight.parts]
    assert len(parts) == len(set(parts))


def test_heads_and_blocks_take_turns() -> None:
    by_name = {weight.name: weight for weight in hf.weights(CONFIG)}
    qkv = by_name["layers.1.attention.qkv.weight"]
    assert list(qkv.shapes().values()) == [(64, 64), (16, 64), (16, 64)]
    packed = torch.full(qkv.shape, -1.0)
    for number, (part, place) in enumerate(qkv.views(packed)):
        assert part == f"model.layers.1.self_attn.{'qkv'[number]}_proj.weight"
        rows = torch.arange(place.shape[0] * place.shape[1] * place.shape[2]) + 1000.0 * number
        place.copy_(rows.view(*place.shape[:3], 1).expand_as(place))
    # Four query heads of 8 rows, their key head, their value head; then the second KV head's.
    one_head = torch.arange(8.0)
    wanted = [torch.arange(32.0), 1000 + one_head, 2000 + one_head]
    wanted += [32 + torch.arange(32.0), 1008 + one_head, 2008 + one_head]
    assert torch.equal(packed[:, 5], torch.cat(wanted))

    gate_up = by_name["layers.0.mlp.gate_up.weight"]
    packed = torch.empty(gate_up.shape)
    for number, (_, place) in enumerate(gate_up.views(packed)):
        place.fill_(number)
    assert packed[:, 0].view(-1, 64).unique(dim=1).flatten().tolist() == [0, 1] * 3


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        ({}, LLAMA_8B),
        ({"rope_scaling": None, "head_dim": 128, "torch_dtype": "bfloat16", "pretraining_tp": 1}, LLAMA_8B),
        ({"num_key_value_heads": None}, replace(LLAMA_8B, kv_heads=32)),
        ({"tie_word_embeddings": True}, replace(LLAMA_8B, tied_embeddings=True)),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}}, replace(LLAMA_8B, rope_theta=7.0)),
        (
            {"rope_scaling": {"rope_type": "llama3", **SCALING}},
            replace(LLAMA_8B, rope_scaling=Llama3Scaling()),
        ),
        ({"rope_scaling": {"type": "llama3", **SCALING}}, replace(LLAMA_8B, rope_scaling=Llama3Scaling())),
        (
            {"rope_parameters": {"rope_type": "llama3", "rope_theta": 9, **SCALING, "factor": 32.0}},
            replace(LLAMA_8B, rope_theta=9.0, rope_scaling=Llama3Scaling(factor=32.0)),
        ),
        ({"model_type": "mistral", "sliding_window": None}, LLAMA_8B),
        ({"model_type": "qwen2", "sliding_window": 4096}, replace(LLAMA_8B, qkv_bias=True)),
    ],
)
def test_configs_are_read_and_written(change: dict, wanted: Decoder.Config) -> None:
    config = hf.config_from_hf(LLAMA | change, "x")
    assert config == wanted
    for carried in (LLAMA | change, {}):
        written = hf.config_to_hf(config, "bfloat16", 512, carried)
        assert hf.config_from_hf(json.loads(json.dumps(written)), "x") == wanted
        assert written["torch_dtype"] == "bfloat16"
    changed = replace(config, rope_theta=123.0)
    assert hf.config_from_hf(hf.config_to_hf(changed, "float32", 512, LLAMA | change), "x") == changed


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gemma"}, "model_type is 'gemma'; what can be converted is llama, mistral, qwen2"),
        ({"attention_bias": True}, "attention_bias is True; the decoder computes only False"),
        ({"mlp_bias": True}, "mlp_bias is True"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"attention_dropout": 0.1}, "attention_dropout is 0.1"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ({"quantization_config": {"bits": 4}}, "quantization_config is {'bits': 4}"),
        ({"model_type": "mistral"}, "sliding_window is 4096; the decoder computes only None"),
        ({"model_type": "mistral", "sliding_window": 8}, "sliding_window is 8"),
        ({"model_type": "qwen2", "use_sliding_window": True}, "use_sliding_window is True"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types names others"),
        ({"head_dim": 80}, "head_dim is 80; the decoder's is hidden_size / num_attention_heads, 128"),
        ({"intermediate_size": 11000}, "intermediate_size is 11000; the packing of gate and up rows, 64"),
        ({"num_attention_heads": 31}, "hidden_size is 4096; num_attention_heads 31 must divide it"),
        ({"hidden_size": "4096"}, "hidden_size is '4096'; expected a whole number"),
        ({"num_hidden_layers": True}, "num_hidden_layers is True; expected a whole number"),
        ({"rms_norm_eps": 0}, "rms_norm_eps is 0.0; it must be above 0"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings is 1; expected true or false"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "rope_scaling.rope_type is 'linear'"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_parameters.rope_type is 'yarn'"),
        ({"rope_scaling": {"rope_type": "llama3"}}, "it has no rope_scaling.factor"),
        ({"rope_scaling": [8]}, "rope_scaling is [8]; expected an object"),
        (
            {"rope_scaling": {"rope_type": "llama3", **SCALING, "high_freq_factor": 1}},
            "rope_scaling.low_freq_factor is 1.0; it must be below high_freq_factor 1.0",
        ),
    ],
)
def test_what_the_decoder_cannot_express_is_named(change: dict, message: str) -> None:
    with pytest.raises(UserError) as caught:
        hf.config_from_hf(LLAMA | change, "some/config.json")
    assert str(caught.value).startswith("some/config.json: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"])
def test_a_missing_size_is_named(key: str) -> None:
    with pytest.raises(UserError, match=f"^x: it has no {key};"):
        hf.config_from_hf({name: value for name, value in LLAMA.items() if name != key}, "x")


def test_pairs_of_heads_have_no_model_there() -> None:
    with pytest.raises(UserError, match=r"model\.pairing gqa-2 has no model of transformers"):
        hf.weights(replace(CONFIG, pairing="gqa-2"))


def test_a_config_that_came_along_must_be_of_the_model() -> None:
    with pytest.raises(UserError, match="is of another model: a llama cannot be like"):
        hf.config_to_hf(replace(LLAMA_8B, qkv_bias=True), "float32", 512, LLAMA)
