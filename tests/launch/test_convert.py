"""``flashtrain convert``: there and back to the bit, with all that belongs to a model, in bounded memory."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoTokenizer

from flashtrain.checkpoint import CheckpointStore
from flashtrain.launch import main
from flashtrain.models.decoder import Decoder
from flashtrain.train import convert, snapshot
from tests.launch.conversion import INDEX, command, copy, merge, save_source, tensors
from tests.models import tiny_hf


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_source(tmp_path_factory.mktemp("source") / "llama")


@pytest.mark.parametrize("case", tiny_hf.CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_there_and_back_is_the_same_to_the_bit(case: str, dtype: torch.dtype, tmp_path: Path) -> None:
    source = tiny_hf.save(case, tmp_path / "hf", dtype)
    assert command("hf2ft", source, tmp_path / "ft", "--file-size", "90KB") == 0
    assert command("ft2hf", tmp_path / "ft", tmp_path / "back", "--file-size", "120KB") == 0
    before, after = tensors(source), tensors(tmp_path / "back")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype == dtype
        assert torch.equal(tensor.view(torch.uint8), after[name].view(torch.uint8)), name
    for name in ("config.json", "generation_config.json"):
        assert (tmp_path / "back" / name).read_bytes() == (source / name).read_bytes()
    index = json.loads((tmp_path / "back" / INDEX).read_text())
    for name, file in index["weight_map"].items():
        with safe_open(tmp_path / "back" / file, framework="pt") as opened:
            assert name in opened.keys()  # noqa: SIM118
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in after.values())
    # The default size makes one file, as transformers names it.
    assert command("ft2hf", tmp_path / "ft", tmp_path / "one") == 0
    assert [file.name for file in (tmp_path / "one").glob("*.safetensors*")] == ["model.safetensors"]
    assert sorted(folder.name for folder in tmp_path.iterdir()) == ["back", "ft", "hf", "one"]


def test_the_tokenizer_comes_along_both_ways(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("hf2ft", source, tmp_path / "ft") == 0
    assert command("ft2hf", tmp_path / "ft", tmp_path / "back") == 0
    assert "tokenizer.json" in capsys.readouterr().out
    text = "some more words"
    wanted = AutoTokenizer.from_pretrained(source)(text).input_ids
    assert AutoTokenizer.from_pretrained(tmp_path / "back")(text).input_ids == wanted

    # One given instead, as the file that a training of tokenizers writes.
    alone = tmp_path / "mine.json"
    alone.write_bytes((source / "tokenizer.json").read_bytes())
    (tmp_path / "ft/hf/tokenizer.json").unlink()
    assert command("ft2hf", tmp_path / "ft", tmp_path / "other", "--tokenizer", alone) == 0
    assert AutoTokenizer.from_pretrained(tmp_path / "other")(text).input_ids == wanted


def test_weights_are_rounded_on_request_alone(source: Path, tmp_path: Path) -> None:
    assert command("hf2ft", source, tmp_path / "ft", "--dtype", "bfloat16") == 0
    assert command("ft2hf", tmp_path / "ft", tmp_path / "back") == 0
    stored = tensors(source)
    for name, tensor in tensors(tmp_path / "back").items():
        assert torch.equal(tensor, stored[name].bfloat16())
    assert json.loads((tmp_path / "back/config.json").read_text())["torch_dtype"] == "bfloat16"
    wide = tiny_hf.logits(tmp_path / "back", tiny_hf.tokens())
    assert command("ft2hf", tmp_path / "ft", tmp_path / "wide", "--dtype", "float32") == 0
    assert torch.equal(tiny_hf.logits(tmp_path / "wide", tiny_hf.tokens()), wide)


def test_a_model_that_never_was_on_hugging_face_gets_its_config(tmp_path: Path) -> None:
    for name, changes in {"llama": {}, "qwen2": {"qkv_bias": True, "tied_embeddings": True}}.items():
        config = Decoder.Config(hidden=64, layers=2, heads=4, kv_heads=2, mlp_width=128, **changes)
        model = Decoder(config, torch.Generator().manual_seed(0))
        saved = CheckpointStore(tmp_path / name).save(
            1, {"model": dict(model.named_parameters())}, {"config": convert._settings(config, "float32", 64)}
        )
        assert command("ft2hf", saved, tmp_path / f"{name}-hf") == 0
        written = json.loads((tmp_path / f"{name}-hf/config.json").read_text())
        assert (written["model_type"], written["max_position_embeddings"]) == (name, 64)
        with torch.no_grad():
            wanted = model(tiny_hf.tokens())
        found = tiny_hf.logits(tmp_path / f"{name}-hf", tiny_hf.tokens())
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


def test_what_a_run_changed_reaches_the_export(source: Path, tmp_path: Path) -> None:
    """Another rotary base, and a tokenizer of its own beside the files that came with the weights."""
    assert command("hf2ft", source, tmp_path / "ft") == 0
    weights, _ = snapshot.load_model(tmp_path / "ft")
    model = Decoder(replace(weights.config, rope_theta=50.0))
    model.load_state_dict(weights.state_dict())
    run = tmp_path / "run"
    CheckpointStore(run / "checkpoints").save(
        1,
        {"model": dict(model.named_parameters())},
        {"config": convert._settings(model.config, "float32", 64)},
    )
    copy(tmp_path / "ft/hf", run / "hf")
    assert command("ft2hf", run, tmp_path / "out") == 0
    with torch.no_grad():
        wanted = model(tiny_hf.tokens())
    found = tiny_hf.logits(tmp_path / "out", tiny_hf.tokens())
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
    written = json.loads((tmp_path / "out/config.json").read_text())
    assert (written["rope_theta"], written["max_position_embeddings"]) == (50.0, 128)
    assert (tmp_path / "out/tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()

    (run / "tokenizer.json").write_text("{}")
    assert command("ft2hf", run, tmp_path / "own") == 0
    assert (tmp_path / "own/tokenizer.json").read_text() == "{}"
    assert not (tmp_path / "own/tokenizer_config.json").exists(), "files of two tokenizers were mixed"


def test_a_prompt_is_continued_by_a_converted_model(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("hf2ft", source, tmp_path / "ft") == 0
    assert main.main(["sample", str(tmp_path / "ft"), "--prompt", "some", "--tokens", "3"]) == 0
    assert "some" in capsys.readouterr().out


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_what_old_versions_stored_needlessly_is_dropped(dtype: torch.dtype, tmp_path: Path) -> None:
    """Frequencies, in fp32 whatever the model's dtype, and a tied projection beside its table."""
    folder = tiny_hf.save("llama, tied and scaled", tmp_path / "hf", dtype)
    table = tensors(folder)["model.embed_tokens.weight"].clone()
    needless = {"lm_head.weight": table, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    merge(folder, lambda t: t.update(needless))
    assert command("hf2ft", folder, tmp_path / "ft") == 0
    assert command("ft2hf", tmp_path / "ft", tmp_path / "back") == 0
    after = tensors(tmp_path / "back")
    assert tensors(folder).keys() - after.keys() == needless.keys()
    assert {tensor.dtype for tensor in after.values()} == {dtype}


def test_a_cache_of_links_is_read(source: Path, tmp_path: Path) -> None:
    """The folders of huggingface_hub hold links to files elsewhere."""
    (tmp_path / "snapshot").mkdir()
    for file in source.iterdir():
        (tmp_path / "snapshot" / file.name).symlink_to(file)
    assert command("hf2ft", tmp_path / "snapshot", tmp_path / "ft") == 0
    assert not any(file.is_symlink() for file in (tmp_path / "ft").rglob("*"))
    assert (tmp_path / "ft/hf/tokenizer.json").is_file()


# ru_maxrss would start with the peak of the process that started this one.
MEASURE = """
import re, sys
from pathlib import Path
import torch
from flashtrain.train import convert
torch.set_num_threads(1)
def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
folder = Path(sys.argv[2])
for name in sys.argv[3:]:  # the first time loads what is needed
    Path("/proc/self/clear_refs").write_text("5")
    before = peak()
    getattr(convert, sys.argv[1])(folder / name, folder / f"{name}-out", file_bytes=8 << 20)
print(peak() - before)
assert "transformers" not in sys.modules, "converting must not need it"
"""


def test_memory_stays_near_a_file(tmp_path: Path) -> None:
    """A model of 76 MB in one file, both ways, in files of 8 MB: the process grows by less than 40 MB."""
    from flashtrain.models import hf

    for size, layers in {"small": 1, "large": 24}.items():
        config = Decoder.Config(hidden=256, layers=layers, heads=4, kv_heads=2, mlp_width=768)
        everything = {
            part: torch.ones(shape)
            for weight in hf.weights(config)
            for part, shape in weight.shapes().items()
        }
        (tmp_path / size).mkdir()
        save_file(everything, tmp_path / size / "model.safetensors", metadata={"format": "pt"})
        (tmp_path / size / "config.json").write_text(json.dumps(hf.config_to_hf(config, "float32", 64, {})))
    assert (tmp_path / "large/model.safetensors").stat().st_size > 70e6
    for direction, sizes in (("from_hf", ("small", "large")), ("to_hf", ("small-out", "large-out"))):
        ended = subprocess.run(
            [sys.executable, "-c", MEASURE, direction, tmp_path, *sizes],
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert ended.returncode == 0, ended.stderr
        assert int(ended.stdout) < 40e6, f"{direction} grew by {int(ended.stdout) / 1e6:.0f} MB"
