"""tokenizer.json: training one, loading one, and what ends a document."""

import json
from pathlib import Path

import pytest

from flashtrain.data import ByteTokenizer, JsonTokenizer, load_tokenizer
from flashtrain.data.tokenizer import TOKENIZER, TOKENIZER_CONFIG, keep_tokenizer
from flashtrain.data.vocabulary import BOUNDARY, train_tokenizer
from flashtrain.errors import UserError
from tests.data.sets import make_tokenizer, texts, write_jsonl


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def test_every_text_comes_back(folder: Path) -> None:
    tokenizer = JsonTokenizer(folder)
    assert (tokenizer.vocab_size, tokenizer.boundary) == (400, 0)
    for text in (*texts(9), "", " \n\t", "日本語 🙂 \0", BOUNDARY, f"a{BOUNDARY}b"):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.boundary not in ids  # its name in a text is text
        assert tokenizer.encode_array(text.encode()).tolist() == ids
    assert [ids.tolist() for ids in tokenizer.encode_batch(texts(9))] == [
        tokenizer.encode(text) for text in texts(9)
    ]
    assert len(tokenizer.encode(texts(9)[8])) < 0.7 * len(texts(9)[8].encode())
    with pytest.raises(UnicodeDecodeError):
        tokenizer.encode(b"\xff")


def test_transformers_and_tokenizers_load_what_was_trained(folder: Path) -> None:
    import tokenizers
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    fast = AutoTokenizer.from_pretrained(folder)
    assert isinstance(fast, PreTrainedTokenizerFast)
    assert (fast.eos_token, fast.eos_token_id) == (BOUNDARY, 0)
    plain = tokenizers.Tokenizer.from_file(str(folder / TOKENIZER))
    for text in texts(9):
        ids = JsonTokenizer(folder).encode(text)
        assert fast(text)["input_ids"] == plain.encode(text).ids == ids
        assert fast.decode(ids) == text


def test_training_is_reproducible_and_reads_every_kind(tmp_path: Path, folder: Path) -> None:
    source = tmp_path / "again.jsonl"
    source.write_text((folder.parent / "for_tokenizer.jsonl").read_text())
    train_tokenizer([str(source)], tmp_path / "again", 400)
    assert (tmp_path / "again" / TOKENIZER).read_bytes() == (folder / TOKENIZER).read_bytes()
    for number, text in enumerate(texts(200)):
        (tmp_path / f"{number:03}.txt").write_text(text)
    source.unlink()
    progress: list[tuple[int, int]] = []
    trained = train_tokenizer(
        [str(tmp_path)], tmp_path / "texts", 10_000, advance=lambda *p: progress.append(p)
    )
    assert 400 < trained.vocab_size < 10_000  # such a text has no more
    assert progress[-1][0] == progress[-1][1] == sum(len(text.encode()) for text in texts(200))


def test_damage_is_skipped_or_refused(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "x.jsonl", texts(50))
    with source.open("a") as stream:
        stream.write("{bad\n")
    with pytest.raises(UserError, match=r"x\.jsonl:51: not valid JSON.*--damaged skip"):
        train_tokenizer([str(source)], tmp_path / "out", 300)
    assert not (tmp_path / "out").exists()
    trained = train_tokenizer([str(source)], tmp_path / "out", 300, damaged="skip")
    assert [name.split(": ")[0] for name in trained.damaged] == [f"{source}:51"]
    with pytest.raises(UserError, match="exists: choose another folder"):
        train_tokenizer([str(source)], tmp_path / "out", 300, damaged="skip")


def test_bad_requests_are_refused(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "x.jsonl", ["", ""])
    with pytest.raises(UserError, match="vocab-size is 256; 257 is the least"):
        train_tokenizer([str(source)], tmp_path / "out", 256)
    with pytest.raises(UserError, match="no text to learn"):
        train_tokenizer([str(source)], tmp_path / "out", 300)


def rewrite(folder: Path, target: Path, **changes: object) -> Path:
    """A copy of the tokenizer with changed entries and without a tokenizer_config.json."""
    target.mkdir()
    said = json.loads((folder / TOKENIZER).read_text())
    (target / TOKENIZER).write_text(json.dumps(said | changes))
    return target


def added(*names: str, special: bool = True, first: int = 400) -> list[dict]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": special}
    return [{"id": first + n, "content": name, **flags} for n, name in enumerate(names)]


def test_which_token_ends_documents(folder: Path, tmp_path: Path) -> None:
    two = rewrite(
        folder, tmp_path / "two", added_tokens=added("<|endoftext|>", first=0) + added("</s>", "<x>")
    )
    with pytest.raises(UserError, match=r"has <\|endoftext\|> and </s>, and no tokenizer_config"):
        JsonTokenizer(two)
    assert JsonTokenizer(two, "<x>").boundary == 401
    with pytest.raises(UserError, match="has no token '<y>'"):
        JsonTokenizer(two, "<y>")
    for token in ("</s>", {"content": "</s>"}):
        (two / TOKENIZER_CONFIG).write_text(json.dumps({"eos_token": token}))
        assert JsonTokenizer(two / TOKENIZER).boundary == 400
    plain = rewrite(folder, tmp_path / "plain", added_tokens=added("</s>", special=False))
    with pytest.raises(UserError, match="text can encode to '</s>'"):
        JsonTokenizer(plain, "</s>")


def test_truncation_and_padding_of_the_file_are_off(folder: Path, tmp_path: Path) -> None:
    cutting = rewrite(
        folder,
        tmp_path / "cutting",
        truncation={"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0},
        padding={"strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0,
                 "pad_type_id": 0, "pad_token": "<|endoftext|>"},
    )  # fmt: skip
    text = texts(5)[4]
    assert JsonTokenizer(cutting).encode(text) == JsonTokenizer(folder).encode(text)
    assert JsonTokenizer(cutting).encode_batch(["a"])[0].tolist() == JsonTokenizer(folder).encode("a")


def test_damaged_files_are_named(tmp_path: Path) -> None:
    hollow = '{"version": "1.0", "model": {"type": "BPE", "vocab": {}, "merges": []}}'
    for text, message in (
        ("{}", "is no tokenizer.json"),
        ("", "is no tokenizer.json"),
        (hollow, "has no tokens"),
    ):
        (tmp_path / TOKENIZER).write_text(text)
        with pytest.raises(UserError, match=message) as caught:
            JsonTokenizer(tmp_path)
        assert "\n" not in str(caught.value)
    (tmp_path / TOKENIZER).write_bytes(b"\xff")
    with pytest.raises(UserError, match="is no text"):
        JsonTokenizer(tmp_path)
    with pytest.raises(UserError, match="cannot be read: No such file"):
        load_tokenizer(str(tmp_path / "no.json"))
    with pytest.raises(UserError, match="ends documents with byte 0"):
        load_tokenizer("bytes", "</s>")


def test_what_is_saved_loads_as_the_same_tokenizer(folder: Path, tmp_path: Path) -> None:
    two = rewrite(folder, tmp_path / "two", added_tokens=added("</s>", "<x>"))
    (two / TOKENIZER_CONFIG).write_text(json.dumps({"eos_token": "</s>", "model_max_length": 7}))
    chosen = JsonTokenizer(two, "<x>")
    run = tmp_path / "run"
    run.mkdir()
    keep_tokenizer(ByteTokenizer(), run)
    assert list(run.iterdir()) == []
    keep_tokenizer(chosen, run)
    keep_tokenizer(chosen, run)
    assert JsonTokenizer(run).identity == chosen.identity
    assert json.loads((run / TOKENIZER_CONFIG).read_text())["model_max_length"] == 7
    for other in (ByteTokenizer(), JsonTokenizer(two), JsonTokenizer(folder)):
        with pytest.raises(UserError, match="is not the tokenizer of the data"):
            keep_tokenizer(other, run)
