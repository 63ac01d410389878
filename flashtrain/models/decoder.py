"""A Llama-style decoder: RMSNorm, grouped-query attention with rotary positions, SwiGLU."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from flashtrain.errors import UserError
from flashtrain.nn.attention import Attention, rotary_table
from flashtrain.nn.loss import CrossEntropy
from flashtrain.nn.mlp import PACKING, SwiGLU


class Block(nn.Module):
    """``x + attention(norm(x))``, then ``x + mlp(norm(x))``."""

    def __init__(self, config: "Decoder.Config") -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.hidden, eps=config.norm_epsilon)
        self.attention = Attention(config.hidden, config.heads, config.kv_heads, config.head_dim)
        self.mlp_norm = nn.RMSNorm(config.hidden, eps=config.norm_epsilon)
        self.mlp = SwiGLU(config.hidden, config.mlp_width)

    def forward(self, x: Tensor, rotary: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x), rotary)
        return x + self.mlp(self.mlp_norm(x))


class Decoder(nn.Module):
    """Decoder-only transformer (Llama, arXiv 2302.13971).

    Activations are ``[sequence, batch, hidden]``. Parameters are drawn from ``generator`` alone, in
    order of construction, so every rank that is given the same seed holds the same model.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """``mlp_width`` is a multiple of 64; ``kv_heads`` divides ``heads``, and ``heads`` ``hidden``."""

        vocabulary: int = 256
        hidden: int = 256
        layers: int = 4
        heads: int = 8
        kv_heads: int = 4
        mlp_width: int = 704
        rope_theta: float = 10_000.0
        norm_epsilon: float = 1e-5

        @property
        def head_dim(self) -> int:
            """Width of one attention head."""
            return self.hidden // self.heads

        def validate(self, tensor_degree: int = 1) -> None:
            """Raise UserError for sizes that do not fit together, or do not divide by ``tensor_degree``."""
            for name in ("vocabulary", "hidden", "layers", "heads", "kv_heads", "mlp_width"):
                if getattr(self, name) < 1:
                    raise UserError(f"model.{name} is {getattr(self, name)}; it must be at least 1")
            _must_divide("model.hidden", self.hidden, "model.heads", self.heads)
            _must_divide("model.heads", self.heads, "model.kv_heads", self.kv_heads)
            _must_divide("model.mlp_width", self.mlp_width, "the packing of gate and up rows,", PACKING)
            if self.head_dim % 2:
                raise UserError(
                    f"model.hidden / model.heads is {self.head_dim}; rotary positions need it even"
                )
            for name, parts in (
                ("model.kv_heads", self.kv_heads),
                ("model.vocabulary", self.vocabulary),
                (f"model.mlp_width / {PACKING}", self.mlp_width // PACKING),
            ):
                _must_divide(name, parts, "parallel.tensor", tensor_degree)

    def __init__(self, config: Config, generator: torch.Generator | None = None) -> None:
        config.validate()
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocabulary, config.hidden)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.hidden, eps=config.norm_epsilon)
        self.head = nn.Linear(config.hidden, config.vocabulary, bias=False)
        self.loss = CrossEntropy()
        self._initialise(generator)

    def _initialise(self, generator: torch.Generator | None) -> None:
        # N(0, 2 / (5 hidden)) (arXiv 1910.05895, section 2.2), which fits wide and narrow models; the two
        # projections that write to the residual stream are divided by sqrt(2 L), as in GPT-2, so that its
        # variance does not grow with depth.
        deviation = (2 / (5 * self.config.hidden)) ** 0.5
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2 and not parameter.is_meta:
                writes_residual = name.endswith(("attention.out.weight", "mlp.down.weight"))
                scale = (2 * self.config.layers) ** -0.5 if writes_residual else 1.0
                nn.init.normal_(parameter, std=deviation * scale, generator=generator)

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
        """``tokens [S, B]`` -> logits ``[S, B, V]``, or with ``targets [S, B]`` the mean loss in nats."""
        rotary = rotary_table(tokens.shape[0], self.config.head_dim, self.config.rope_theta, tokens.device)
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x, rotary)
        logits = self.head(self.norm(x))
        return logits if targets is None else self.loss(logits, targets)

    def parameter_count(self, embedding: bool = True) -> int:
        """Parameters in all, or without the input embedding, of the whole model on any rank."""
        own = sum(p.numel() for p in self.parameters())
        return own if embedding else own - self.embedding.weight.numel()


def _must_divide(name: str, value: int, by_name: str, by: int) -> None:
    if value % by:
        raise UserError(f"{name} is {value}; {by_name} {by} must divide it")
