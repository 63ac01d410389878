"""A Hugging Face folder to convert, and what the tests of conversion do with it."""

from collections.abc import Callable
from pathlib import Path

from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from flashtrain.launch import main
from tests.models import tiny_hf

INDEX = "model.safetensors.index.json"


def save_source(folder: Path) -> Path:
    """A model in several files, with a tokenizer."""
    tiny_hf.save("llama, grouped", folder)
    tokenizer().save_pretrained(folder)
    return folder


def tokenizer() -> PreTrainedTokenizerFast:
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=64, special_tokens=["</s>"])
    trained.train_from_iterator(["some words and some more words"] * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=trained, eos_token="</s>")


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


def merge(folder: Path, change: Callable[[dict], None]) -> None:
    """All in one file, without an index."""
    everything = tensors(folder)
    for file in (*folder.glob("*.safetensors"), folder / INDEX):
        file.unlink()
    change(everything)
    save_file(everything, folder / "model.safetensors", metadata={"format": "pt"})
