"""Text to windows of tokens: corpus, tokenizer, and an order of samples that no rank count can change."""

from flashtrain.data.corpus import Corpus, Inventory, unigram_entropy
from flashtrain.data.sampler import Windows, evaluation_windows
from flashtrain.data.tokenizer import ByteTokenizer, Tokenizer

__all__ = [
    "ByteTokenizer",
    "Corpus",
    "Inventory",
    "Tokenizer",
    "Windows",
    "evaluation_windows",
    "unigram_entropy",
]
