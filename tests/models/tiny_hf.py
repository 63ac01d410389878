"""Tiny models of transformers with random weights, for the tests of conversion."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, PreTrainedModel, Qwen2Config
from transformers.utils import logging

logging.disable_progress_bar()

SIZES = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "max_position_embeddings": 128,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    # Below the tests' sequences, so that pairs of every kind turn.
    "original_max_position_embeddings": 24,
}
CASES: dict[str, Any] = {
    "llama, each head its own": LlamaConfig(**SIZES, num_key_value_heads=8, rms_norm_eps=1e-3),
    "llama, grouped": LlamaConfig(**SIZES, num_key_value_heads=2),
    "llama, tied and scaled": LlamaConfig(
        **SIZES, num_key_value_heads=4, tie_word_embeddings=True, rope_parameters=LLAMA3
    ),
    "mistral": MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=None),
    "qwen2": Qwen2Config(**SIZES, num_key_value_heads=4, rope_parameters={"rope_theta": 5e5}),
    "qwen2, tied": Qwen2Config(**SIZES, num_key_value_heads=2, tie_word_embeddings=True),
}


def build(case: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The model of a case. Norms are not ones and biases not zeros, so that every tensor counts."""
    model = AutoModelForCausalLM.from_config(CASES[case], dtype=dtype)
    generator = torch.Generator().manual_seed(len(case))
    for name, parameter in model.named_parameters():
        drawn = torch.randn(parameter.shape, generator=generator) * (0.3 if parameter.dim() == 1 else 0.12)
        parameter.data.copy_(drawn + 1.0 if "norm" in name else drawn)
    return model.eval()


def save(case: str, folder: Path, dtype: torch.dtype = torch.float32, shard: str = "200KB") -> Path:
    """Write the model of a case as transformers does, in several files."""
    build(case, dtype).save_pretrained(folder, max_shard_size=shard)
    return folder


def tokens(sequence: int = 48, batch: int = 3) -> Tensor:
    """Tokens ``[S, B]``."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, SIZES["vocab_size"], (sequence, batch), generator=generator)


@torch.no_grad()
def logits(folder: Path, given: Tensor) -> Tensor:
    """What transformers computes from ``folder`` for ``given [S, B]``: fp32 ``[S, B, V]``."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model(given.t()).logits.transpose(0, 1)
