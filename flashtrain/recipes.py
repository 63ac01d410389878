"""Named starting points: functions that return the config of a run."""

from collections.abc import Callable
from pathlib import Path

from flashtrain.models.decoder import Decoder
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


RECIPES: dict[str, Callable[[], Trainer.Config]] = {
    "demo": demo,
    "continue-pretraining": continue_pretraining,
}
