"""Text to windows of tokens: sources, tokenizers, and an order of samples that no rank count can change."""

from flashtrain.data.blend import Blend
from flashtrain.data.corpus import Corpus, Inventory, unigram_entropy
from flashtrain.data.indexed import TokenFile
from flashtrain.data.sampler import Windows, evaluation_windows
from flashtrain.data.source import PreparedData, Source, open_source
from flashtrain.data.tokenizer import ByteTokenizer, JsonTokenizer, Tokenizer, load_tokenizer

__all__ = [
    "Blend",
    "ByteTokenizer",
    "Corpus",
    "Inventory",
    "JsonTokenizer",
    "PreparedData",
    "Source",
    "TokenFile",
    "Tokenizer",
    "Windows",
    "evaluation_windows",
    "load_tokenizer",
    "open_source",
    "unigram_entropy",
]
