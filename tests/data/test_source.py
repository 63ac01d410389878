"""Prepared sets as a run's data: splits, packing, tokenizers, weights, and refusals in one line."""

from pathlib import Path

import numpy as np
import pytest
import torch

from flashtrain import config as configs
from flashtrain.data import Corpus, JsonTokenizer, PreparedData, open_source
from flashtrain.data.prepare import prepare
from flashtrain.data.source import resolved
from flashtrain.errors import UserError
from tests.data.sets import make_tokenizer, texts, write_jsonl
from tests.data.test_indexed import write_set


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sets ``large`` and ``small`` of one tokenizer, ``bytes`` of another, ``foreign`` by Megatron."""
    folder = tmp_path_factory.mktemp("source")
    tokenizer = str(make_tokenizer(folder))
    for name, documents, with_tokenizer in (
        ("large", texts(300), tokenizer),
        ("small", texts(60, first=300), tokenizer),
        ("bytes", texts(60), "bytes"),
    ):
        source = write_jsonl(folder / f"{name}.jsonl", documents)
        prepare([str(source)], folder / name, with_tokenizer, workers=1)
    write_set(folder / "foreign", [[1, 2, 3, 0]] * 100, np.int32)
    return folder


def data(folder: Path, *names: str, **settings: object) -> PreparedData:
    config = PreparedData.Config(sets=tuple(str(folder / name) for name in names), **settings)  # type: ignore[arg-type]
    return PreparedData(config)


def test_splits_share_no_document_and_leave_none_out(folder: Path) -> None:
    source = data(folder, "large", held_out=0.1)
    (train,), (held_out,) = source._train, source._held_out
    tokenizer = JsonTokenizer(folder / "tokenizer")
    tokens = np.concatenate([train[0 : len(train)], held_out[0 : len(held_out)]])
    documents = "".join(tokenizer.decode(part) for part in np.split(tokens, np.flatnonzero(tokens == 0) + 1))
    assert documents == "".join(texts(300))
    assert train[len(train) - 1 : len(train)] == tokenizer.boundary
    assert 0.05 < len(held_out) / len(tokens) <= 0.1


def test_windows_are_packed_and_know_where_documents_begin(folder: Path) -> None:
    blend = data(folder, "large", "small", weights=(3.0, 1.0)).samples(64, seed=5)
    found = 0
    for index in range(40):
        inputs, targets = blend.batch(index, 1)
        window = torch.cat([inputs[0], targets[0, -1:]])
        starts = blend.document_starts(index)
        after_boundaries = (window[:-1] == 0).nonzero().flatten() + 1
        assert [start for start in starts if start > 0] == after_boundaries.tolist()
        found += len(starts)
    assert found > 40
    sets = [blend.where(index)[0] for index in range(4000)]
    assert sets.count(1) == pytest.approx(1000, abs=100)


def test_no_weights_mean_shares_by_size(folder: Path) -> None:
    source = data(folder, "large", "small")
    assert source.weights == [len(tokens) for tokens in source._train]
    assert "large: " in source.describe()
    assert "% of the samples" in source.describe()


def test_held_out_windows_come_from_every_set(folder: Path) -> None:
    source = data(folder, "large", "small", weights=(1.0, 1.0), held_out=0.2)
    held_out = source.held_out(16, 8)
    assert held_out.inputs.shape == held_out.targets.shape == (8, 16)
    assert torch.equal(held_out.inputs[:, 1:], held_out.targets[:, :-1])
    large = source._held_out[0]
    assert held_out.inputs[0].tolist() == large[0:16].tolist()
    assert held_out.targets[-1, -1] == source._held_out[1][len(source._held_out[1]) - 1 :][0]
    assert 0 < held_out.unigram_entropy < np.log(400)
    assert len(source.held_out(16, 1).inputs) == 1


def test_a_config_of_prepared_sets_survives_toml_and_names_its_tokenizer(
    folder: Path, tmp_path: Path
) -> None:
    from flashtrain.recipes import demo

    words = ["--data.class", "PreparedData.Config", "--data.sets", f"{folder / 'large'},{folder / 'small'}",
             "--data.weights", "0.7,0.3"]  # fmt: skip
    config = configs.resolve(demo(), overrides=words)
    assert isinstance(config.data, PreparedData.Config)
    assert config.data.weights == (0.7, 0.3)
    named = resolved(config.data)
    assert isinstance(named, PreparedData.Config)
    assert named.tokenizer == str(folder / "large")
    configs.save(config, tmp_path / "config.toml")
    assert configs.resolve(demo(), tmp_path / "config.toml") == config
    plain = Corpus.Config()
    assert resolved(plain) is plain
    assert resolved(PreparedData.Config(sets=(str(folder / "bytes"),))).tokenizer == "bytes"  # type: ignore[union-attr]


def test_sets_of_megatron_need_a_tokenizer(folder: Path) -> None:
    with pytest.raises(UserError, match=r"does not say which tokenizer made it: set data\.tokenizer"):
        data(folder, "foreign")
    source = data(folder, "foreign", tokenizer=str(folder / "tokenizer"))
    assert source.samples(8, 0).document_starts(0).tolist() in ([0, 4, 8], [3, 7], [2, 6], [1, 5])


def test_documents_without_a_boundary_are_refused_where_it_is_needed(folder: Path, tmp_path: Path) -> None:
    for name in ("large", "bytes"):
        data(folder, name).check_boundaries()
    write_set(tmp_path / "joined", [[1, 2, 3]] * 100)
    source = data(tmp_path, "joined", tokenizer="bytes")
    with pytest.raises(UserError, match=r"joined do not end with the tokenizer's boundary, token 0: prepare"):
        source.check_boundaries()


def test_a_token_outside_the_vocabulary_is_named(folder: Path, tmp_path: Path) -> None:
    write_set(tmp_path / "wide", [[1, 2, 300, 0]] * 100)
    samples = data(tmp_path, "wide", tokenizer="bytes").samples(8, 0)
    with pytest.raises(UserError, match=r"wide\.bin holds token 300, but its tokenizer has 256"):
        samples.batch(0, 1)


def test_bad_settings_are_one_line(folder: Path, tmp_path: Path) -> None:
    write_set(tmp_path / "one", [[1, 2, 3, 0]])
    (tmp_path / "begun").mkdir()
    for make, message in (
        (lambda: data(folder), "data.sets is empty"),
        (lambda: data(folder, "large", weights=(1.0, 2.0)), "data.weights holds 2 for 1 data.sets"),
        (lambda: data(folder, "large", held_out=0.0), "data.held_out is 0.0"),
        (lambda: data(folder, "large", "bytes"), "bytes was made with another tokenizer"),
        (
            lambda: data(folder, "large", tokenizer="bytes"),
            "large was made with another tokenizer than bytes",
        ),
        (lambda: data(tmp_path, "one", tokenizer="bytes"), "with its 1 documents cannot be split"),
        (lambda: data(tmp_path, "begun", tokenizer="bytes"), "begun holds no complete prepared set"),
        (lambda: data(tmp_path, "no", tokenizer="bytes"), r"no\.bin cannot be read: No such file"),
        (lambda: data(tmp_path, "no"), r"no\.bin cannot be read: No such file"),
        (lambda: data(tmp_path, "begun"), "begun holds no complete prepared set"),
        (lambda: data(folder, "small").samples(10**6, 0), "one window takes 1000000"),
        (lambda: data(folder, "small", "large", weights=(-1.0, 1.0)).samples(8, 0), "the weight of .*small"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            make()
        assert "\n" not in str(caught.value)


def test_plain_text_is_a_source_too(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("".join(texts(50)))
    source = open_source(Corpus.Config(source=str(tmp_path / "x.txt")))
    assert source.tokenizer.vocab_size == 256
    assert source.samples(8, 0).batch(0, 2)[0].shape == (2, 8)
    assert source.held_out(8, 3).inputs.shape == (3, 8)
