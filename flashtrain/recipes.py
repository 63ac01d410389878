"""Named starting points: functions that return the config of a run."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from flashtrain.methods.progressive_sharing import ProgressiveSharing
from flashtrain.models.decoder import Decoder
from flashtrain.nn.shared_attention import Sharing
from flashtrain.parallel.mesh import Degrees
from flashtrain.train.optimizer import AdamW
from flashtrain.train.settings import Checkpointing, Training
from flashtrain.train.trainer import Trainer


def demo() -> Trainer.Config:
    """Minutes on two CPU cores: 2.5 M parameters, the standard library's sources, tensor parallel over 2."""
    return Trainer.Config(
        model=Decoder.Config(hidden=192, layers=6, heads=6, kv_heads=2, mlp_width=512),
        train=Training(steps=360, batch=16, sequence=128, evaluate_every=120),
        optimizer=AdamW.Config(learning_rate=3e-3, warmup=40),
        parallel=Degrees(tensor=2),
        checkpoint=Checkpointing(every=120),
    )


def continue_pretraining() -> Trainer.Config:
    """Go on with the model in ``train.init_from``, such as one of Hugging Face; tensor parallel over 2.

    First ``flashtrain convert hf2ft SOURCE runs/base``. The learning rate is a tenth of what such models
    are trained with from scratch, after a warm-up, since the optimizer's moments start anew.
    """
    return Trainer.Config(
        train=Training(
            steps=1000,
            dtype="bfloat16",
            batch=16,
            sequence=1024,
            evaluate_every=100,
            init_from=Path("runs/base"),
        ),
        optimizer=AdamW.Config(learning_rate=3e-5, warmup=100),
        parallel=Degrees(tensor=2),
        checkpoint=Checkpointing(every=100),
    )


def gqkva() -> Trainer.Config:
    """The demo with every one of 3 query heads and its 2 KV heads as a pair (GQKVA, arXiv 2311.03426)."""
    config = demo()
    return replace(config, model=replace(config.model, pairing="gqkva-3.2"))


def gqkva_1b() -> Trainer.Config:
    """LLaMA-1B with 8 query heads and 4 KV heads in 32 pairs, in bf16, for one GPU of 80 GB; bring your data.

    The shape is TinyLlama's (22 layers, hidden 2048) with the pairs of GQKVA (arXiv 2311.03426).
    """
    return Trainer.Config(
        model=Decoder.Config(
            vocabulary=32000,
            hidden=2048,
            layers=22,
            heads=32,
            mlp_width=5632,
            pairing="gqkva-8.4",
        ),
        train=Training(steps=20_000, dtype="bfloat16", batch=32, accumulate=16, sequence=4096),
        optimizer=AdamW.Config(learning_rate=4e-4, warmup=1000),
        parallel=Degrees(tensor=1),
        checkpoint=Checkpointing(every=500),
    )


def epas() -> Trainer.Config:
    """The demo in which the later half of the layers take over queries and keys (EPAS, arXiv 2601.19089).

    Every 80 steps one more of the last three; the last 120 steps train with all three.
    """
    # On a CPU, gradients that are formed once are formed from whole matrices of scores.
    return _progressive(demo(), Sharing(share="QK", deferred=False), interval=80)


def echo() -> Trainer.Config:
    """As ``epas`` with keys and values: our reconstruction of ECHO-LLaMA (arXiv 2505.17331)."""
    return _progressive(demo(), Sharing(share="KV"), interval=80)


def epas_1b() -> Trainer.Config:
    """EPAS (arXiv 2601.19089): TinyLlama, 0.25 M tokens a step, 4000 steps, 11 of 22 layers; bring your data.

    The paper gives neither interval, growth nor learning rate; these are ours.
    """
    return _progressive(_of_1b(kv_heads=4), Sharing(share="QK"), interval=100)


def echo_1b() -> Trainer.Config:
    """Our reconstruction of ECHO-LLaMA (arXiv 2505.17331): LLaMA-1B with 32 KV heads; bring your data.

    What is public names no schedule: it is that of ``epas_1b``, as is the rest. Less arithmetic explains 1.07
    times the speed at 4096 tokens, and not what its abstract claims.
    """
    return _progressive(_of_1b(kv_heads=32), Sharing(share="KV"), interval=100)


def _progressive(config: Trainer.Config, sharing: Sharing, interval: int) -> Trainer.Config:
    model = replace(config.model, sharing=sharing)
    return replace(config, model=model, sharing=ProgressiveSharing.Config(interval=interval))


def _of_1b(kv_heads: int) -> Trainer.Config:
    return Trainer.Config(
        model=Decoder.Config(
            vocabulary=32_000, hidden=2048, layers=22, heads=32, kv_heads=kv_heads, mlp_width=5632
        ),
        train=Training(
            steps=4000,
            dtype="bfloat16",
            batch=128,
            sequence=2048,
            accumulate=16,
            evaluate_every=400,
        ),
        optimizer=AdamW.Config(learning_rate=4e-4, warmup=200),
        checkpoint=Checkpointing(every=400),
    )


RECIPES: dict[str, Callable[[], Trainer.Config]] = {
    "demo": demo,
    "continue-pretraining": continue_pretraining,
    "gqkva": gqkva,
    "gqkva-1b": gqkva_1b,
    "epas": epas,
    "echo": echo,
    "epas-1b": epas_1b,
    "echo-1b": echo_1b,
}
