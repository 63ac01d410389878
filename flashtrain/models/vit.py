"""A vision transformer with any pairing of query and KV heads, for the sizes of GQKVA's paper."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, gelu

from flashtrain.errors import UserError
from flashtrain.nn.attend import Heads
from flashtrain.nn.paired import PairedProjection
from flashtrain.nn.paired_attention import attend_pairs
from flashtrain.nn.pairing import Order, Pairing


class VisionTransformer(nn.Module):
    """ViT (arXiv 2010.11929) for classification, with pairs of heads (arXiv 2311.03426).

    Patches, a class token, learned positions, pre-norm blocks of attention over all tokens and a GELU MLP,
    biases everywhere. Activations are ``[tokens, batch, hidden]``. The defaults are ViT-S/16.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """``image`` and ``patch`` are sides in pixels; ``pairing`` as in ``Pairing.named``."""

        image: int = 224
        patch: int = 16
        channels: int = 3
        classes: int = 1000
        hidden: int = 384
        layers: int = 12
        heads: int = 6
        mlp_width: int = 1536
        pairing: str = "mha"
        pair_order: Order = "j_major"
        norm_epsilon: float = 1e-6

        @property
        def head_dim(self) -> int:
            """Width of one attention head."""
            return self.hidden // self.heads

        @property
        def patches(self) -> int:
            """Patches of an image."""
            return (self.image // self.patch) ** 2

        def validate(self) -> None:
            """Raise UserError for sizes that do not fit together."""
            for name, value in vars(self).items():
                if isinstance(value, int | float) and not value > 0:
                    raise UserError(f"model.{name} is {value}; it must be above 0")
            for name, parts in (("image", "patch"), ("hidden", "heads")):
                value, by = getattr(self, name), getattr(self, parts)
                if value % by:
                    raise UserError(f"model.{name} is {value}; model.{parts} {by} must divide it")
            Pairing.named(self.pairing, self.heads, self.pair_order)

    def __init__(self, config: Config, generator: torch.Generator | None = None) -> None:
        config.validate()
        super().__init__()
        self.config = config
        self.embedding = nn.Linear(config.channels * config.patch**2, config.hidden)
        self.class_token = nn.Parameter(torch.zeros(config.hidden))
        self.positions = nn.Parameter(torch.empty(config.patches + 1, config.hidden))
        self.layers = nn.ModuleList(VisionBlock(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.hidden, eps=config.norm_epsilon)
        self.head = nn.Linear(config.hidden, config.classes)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2 and not parameter.is_meta:
                nn.init.trunc_normal_(parameter, std=0.02, generator=generator)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, images: Tensor, targets: Tensor | None = None) -> Tensor:
        """``images [B, C, side, side]`` -> logits ``[B, classes]``; with ``targets [B]`` their mean loss."""
        side = self.config.patch
        patches = images.unfold(2, side, side).unfold(3, side, side)  # [B, C, rows, columns, side, side]
        x = self.embedding(patches.permute(2, 3, 0, 1, 4, 5).flatten(3).flatten(0, 1))
        x = torch.cat([self.class_token.expand(1, x.shape[1], -1), x]) + self.positions.unsqueeze(1)
        for layer in self.layers:
            x = layer(x)
        logits = self.head(self.norm(x[0]))
        return logits if targets is None else cross_entropy(logits.float(), targets)

    def flops_per_image(self) -> float:
        """FLOPs of training on one image, forward and backward."""
        config, tokens = self.config, self.config.patches + 1
        within = sum(p.numel() for p in self.layers.parameters() if p.dim() == 2)
        products = 2.0 * (config.patches * self.embedding.weight.numel() + self.head.weight.numel())
        meeting = 4.0 * config.layers * tokens**2 * config.hidden
        return 3.0 * (products + 2.0 * tokens * within + meeting)

    def parameter_count(self) -> int:
        """Parameters in all."""
        return sum(parameter.numel() for parameter in self.parameters())


class VisionBlock(nn.Module):
    """``x + attention(norm(x))``, then ``x + mlp(norm(x))``."""

    def __init__(self, config: VisionTransformer.Config) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.attention_norm = nn.LayerNorm(config.hidden, eps=config.norm_epsilon)
        pairing = Pairing.named(config.pairing, config.heads, config.pair_order)
        self.qkv = PairedProjection(config.hidden, pairing, config.head_dim, bias=True)
        self.out = nn.Linear(config.heads * config.head_dim, config.hidden)
        self.mlp_norm = nn.LayerNorm(config.hidden, eps=config.norm_epsilon)
        self.up = nn.Linear(config.hidden, config.mlp_width)
        self.down = nn.Linear(config.mlp_width, config.hidden)

    def forward(self, x: Tensor) -> Tensor:
        """``x [tokens, batch, hidden]`` -> the same."""
        pairing = self.qkv.pairing
        packed = self.qkv(self.attention_norm(x)).unflatten(-1, (-1, self.head_dim)).permute(1, 2, 0, 3)
        heads = Heads(*packed.split([pairing.n_q, pairing.n_kv, pairing.n_kv], dim=1))
        mixed = attend_pairs(heads, pairing, causal=False)
        x = x + self.out(mixed.permute(2, 0, 1, 3).flatten(2))
        return x + self.down(gelu(self.up(self.mlp_norm(x))))
