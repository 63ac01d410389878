"""``flashtrain convert``: whole, bit for bit, in bounded memory; and one clear line for what is damaged."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from flashtrain.checkpoint import CheckpointStore
from flashtrain.launch import main
from flashtrain.models.decoder import Decoder
from flashtrain.train import convert, snapshot
from tests.models import tiny_hf

LLAMA = "llama, grouped"
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in several files, with a tokenizer."""
    folder = tiny_hf.save(LLAMA, tmp_path_factory.mktemp("source") / "llama")
    tokenizer().save_pretrained(folder)
    return folder


def tokenizer() -> PreTrainedTokenizerFast:
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel()
    trained.train_from_iterator(["some words and some more words"] * 3, trainers.BpeTrainer(vocab_size=64))
    return PreTrainedTokenizerFast(tokenizer_object=trained)


def command(*words: object) -> int:
    return main.main(["convert", *map(str, words)])


def tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a Hugging Face folder."""
    return {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}


def copy(source: Path, target: Path) -> Path:
    target.mkdir()
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


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


def test_a_prompt_is_continued_by_a_converted_model(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("hf2ft", source, tmp_path / "ft") == 0
    assert main.main(["sample", str(tmp_path / "ft"), "--prompt", "some", "--tokens", "3"]) == 0
    assert "some" in capsys.readouterr().out


def edit(file: Path, change: Callable[[dict], None]) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-7])


def first(folder: Path) -> Path:
    return min(folder.glob("*.safetensors"))


def rewrite(file: Path, change: Callable[[dict], None]) -> None:
    content = load_file(file)
    change(content)
    save_file(content, file, metadata={"format": "pt"})


def merge(folder: Path, change: Callable[[dict], None]) -> None:
    """All in one file, without an index."""
    everything = tensors(folder)
    for file in (*folder.glob("*.safetensors"), folder / INDEX):
        file.unlink()
    change(everything)
    save_file(everything, folder / "model.safetensors", metadata={"format": "pt"})


def place(name: str) -> Callable[[Path], None]:
    return lambda f: edit(f / INDEX, lambda c: c["weight_map"].update({"model.norm.weight": name}))


NORM = "model.norm.weight"
DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a file is missing": (lambda f: first(f).unlink(), "00001-of-"),
    "a file is cut off": (lambda f: truncate(first(f)), "is damaged or cannot be read"),
    "a file is empty": (lambda f: first(f).write_bytes(b""), "is damaged or cannot be read"),
    "a file is no safetensors": (lambda f: first(f).write_bytes(b"x" * 5000), "is damaged or cannot be read"),
    "a path leads out": (place("../evil.safetensors"), "'../evil.safetensors', which is no safetensors file"),
    "an absolute path": (place("/etc/passwd.safetensors"), "which is no safetensors file of this folder"),
    "a path is no text": (place(7), "places model.norm.weight in 7"),  # type: ignore[arg-type]
    "the index names another file": (place("model-00001-of-00099.safetensors"), "is missing, though"),
    "the index is no JSON": (lambda f: (f / INDEX).write_text("{"), f"{INDEX} is not JSON"),
    "the index is empty": (lambda f: edit(f / INDEX, lambda c: c.pop("weight_map")), "has no weight_map"),
    "the index lacks a tensor": (
        lambda f: edit(f / INDEX, lambda c: c["weight_map"].pop(NORM)),
        f"holds {NORM}, but",
    ),
    "the index names a tensor too many": (
        lambda f: edit(f / INDEX, lambda c: c["weight_map"].update({"x": first(f).name})),
        "lacks x, which",
    ),
    "no weights": (lambda f: [t.unlink() for t in f.glob("model*")], "holds neither model.safetensors nor"),
    "pickled weights": (
        lambda f: [t.unlink() for t in f.glob("model*")] + [(f / "pytorch_model.bin").touch()],
        "pytorch_model.bin is a pickle, which is not read",
    ),
    "a tensor is missing": (lambda f: merge(f, lambda t: t.pop(NORM)), f"lacks {NORM}"),
    "a tensor too many": (
        lambda f: merge(f, lambda t: t.update(extra=torch.ones(1))),
        "extra is not a tensor of the model",
    ),
    "a wrong shape": (
        lambda f: merge(f, lambda t: t.update({NORM: torch.ones(65)})),
        f"{NORM} has shape [65]; config.json asks for [64]",
    ),
    "mixed dtypes": (
        lambda f: merge(f, lambda t: t.update({NORM: torch.ones(64, dtype=torch.bfloat16)})),
        "choose one with --dtype",
    ),
    "a dtype of no weights": (
        lambda f: merge(f, lambda t: t.update({NORM: torch.ones(64, dtype=torch.int8)})),
        f"{NORM} has dtype I8",
    ),
    "tied, with another projection": (
        lambda f: edit(f / "config.json", lambda c: c.update(tie_word_embeddings=True)),
        "lm_head.weight is not model.embed_tokens.weight",
    ),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json: No such file"),
    "a config that is no object": (lambda f: (f / "config.json").write_text("[]"), "is not a JSON object"),
    "another architecture": (
        lambda f: edit(f / "config.json", lambda c: c.update(model_type="gemma2")),
        "config.json: model_type is 'gemma2'",
    ),
    "another size": (
        lambda f: edit(f / "config.json", lambda c: c.update(num_hidden_layers=3)),
        "lacks model.layers.2.",
    ),
}


def assert_refused(words: list[object], message: str, out: Path, err: Callable[[], tuple[str, str]]) -> None:
    """Exit code 2, one line with ``message``, and nothing in ``out`` or beside it."""
    before = sorted(out.parent.iterdir())
    assert command(*words) == 2
    line = err()[1]
    assert line.count("\n") == 1, line
    assert line.startswith("flashtrain: error: ")
    assert message in line
    assert sorted(out.parent.iterdir()) == before


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_source_is_one_line_and_leaves_nothing(
    damage: str, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil, message = DAMAGES[damage]
    spoil(copy(source, tmp_path / "hf"))
    out = tmp_path / "out"
    assert_refused(["hf2ft", tmp_path / "hf", out], message, out, capsys.readouterr)


def test_what_old_versions_stored_twice_or_needlessly_is_dropped(source: Path, tmp_path: Path) -> None:
    folder = tiny_hf.save("llama, tied and scaled", tmp_path / "hf")
    tied = {"lm_head.weight": tensors(folder)["model.embed_tokens.weight"].clone()}
    merge(folder, lambda t: t.update(tied | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}))
    assert command("hf2ft", folder, tmp_path / "ft") == 0
    assert command("ft2hf", tmp_path / "ft", tmp_path / "back") == 0
    assert tensors(folder).keys() - tensors(tmp_path / "back").keys() == {
        *tied,
        "model.layers.0.self_attn.rotary_emb.inv_freq",
    }


def test_a_cache_of_links_is_read(source: Path, tmp_path: Path) -> None:
    """The folders of huggingface_hub hold links to files elsewhere."""
    (tmp_path / "snapshot").mkdir()
    for file in source.iterdir():
        (tmp_path / "snapshot" / file.name).symlink_to(file)
    assert command("hf2ft", tmp_path / "snapshot", tmp_path / "ft") == 0
    assert not any(file.is_symlink() for file in (tmp_path / "ft").rglob("*"))
    assert (tmp_path / "ft/hf/tokenizer.json").is_file()


def test_a_damaged_checkpoint_is_one_line_and_leaves_nothing(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ft, out = tmp_path / "ft", tmp_path / "out"
    assert command("hf2ft", source, ft) == 0
    capsys.readouterr()
    refused = [
        (["ft2hf", tmp_path / "nothing", out], "there is no checkpoint in"),
        (["ft2hf", ft, out, "--tokenizer", tmp_path / "none.json"], "none.json"),
        (["ft2hf", ft, out, "--tokenizer", ft / "model"], "holds no tokenizer"),
        (["hf2ft", source, out, "--tokenizer", source], "--tokenizer is for ft2hf"),
        (["ft2hf", ft, out, "--file-size", "2 apples"], "--file-size is 2 apples; expected a size"),
        (["ft2hf", ft, ft], "exists already"),
        (["hf2ft", tmp_path / "nothing", out], "there is no folder"),
    ]
    for words, message in refused:
        assert_refused(words, message, out, capsys.readouterr)
    weights = ft / "model/model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert_refused(["ft2hf", ft, out], "its sha256 is", out, capsys.readouterr)
    (ft / "manifest.json").write_text("{}")
    assert_refused(["ft2hf", ft, out], "is not a valid manifest", out, capsys.readouterr)


def test_links_in_a_checkpoint_are_not_followed_into_the_export(source: Path, tmp_path: Path) -> None:
    assert command("hf2ft", source, tmp_path / "ft") == 0
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "ft/hf/tokenizer.json").unlink()
    (tmp_path / "ft/hf/tokenizer.json").symlink_to(tmp_path / "secret")
    assert command("ft2hf", tmp_path / "ft", tmp_path / "out") == 0
    assert not (tmp_path / "out/tokenizer.json").exists()


@pytest.mark.parametrize("direction", ["hf2ft", "ft2hf"])
def test_a_full_disk_is_one_line_and_leaves_nothing(direction: str, source: Path, tmp_path: Path) -> None:
    given = source
    if direction == "ft2hf":
        given = tmp_path / "ft"
        assert command("hf2ft", source, given) == 0
    code = (
        "import resource, signal, sys; from flashtrain.launch import main\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (120_000, 120_000))\n"
        "sys.exit(main.main(sys.argv[1:]))"
    )
    before = sorted(tmp_path.iterdir())
    ended = subprocess.run(
        [sys.executable, "-c", code, "convert", direction, given, tmp_path / "out", "--file-size", "100KB"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert "00001-of-" in ended.stdout, "the first file fits"
    assert ended.returncode == 2, ended.stderr
    assert ended.stderr.startswith("flashtrain: error: cannot write "), ended.stderr
    assert ended.stderr.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("how", ["interrupt", "kill"])
def test_a_conversion_that_is_stopped_leaves_no_folder_of_the_name(
    how: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    if how == "interrupt":

        def stop(name: str) -> None:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            convert.from_hf(source, out, file_bytes=100_000, on_file=stop)
        assert list(tmp_path.iterdir()) == []
        return
    pid = os.fork()
    if pid == 0:
        convert.from_hf(
            source, out, file_bytes=100_000, on_file=lambda _: os.kill(os.getpid(), signal.SIGKILL)
        )
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    assert not out.exists()
    assert all(entry.name.startswith(".tmp-out-") for entry in tmp_path.iterdir())
    convert.from_hf(source, out)
    assert snapshot.load_model(out)


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
