"""torchtitan 0.2.2 on the model, mesh and batch of a config, as a peer that ``flashtrain bench`` times.

Its own trainer runs: FSDP2 and tensor parallelism, torch.compile, fused AdamW; fp32 parameters and bf16
products, or bf16 for all where there is no FSDP. It gets random tokens, and the process group that is there.
"""

import gc
import importlib.util
import os
from collections.abc import Iterator
from dataclasses import replace
from itertools import count
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from flashtrain.errors import UserError, first_line

if TYPE_CHECKING:
    from flashtrain.train.trainer import Trainer

VERSION = "0.2.2"
_names = count()
# Its selective mode keeps products and attention, as pointwise does; it has nothing for attention alone.
_RECOMPUTE = {"none": "none", "pointwise": "selective", "attention": "selective", "full": "full"}


def check(config: "Trainer.Config") -> None:
    """Raise UserError if torchtitan is missing, or cannot train what ``config`` says."""
    if importlib.util.find_spec("torchtitan") is None:
        raise UserError(
            f"--against torchtitan: it is not installed; pip install torchtitan=={VERSION} beside flashtrain"
        )
    if not torch.cuda.is_available():
        raise UserError("--against torchtitan: it needs GPUs, and there are none here")
    for name in ("tied_embeddings", "qkv_bias"):
        if getattr(config.model, name):
            raise UserError(f"--against torchtitan: its Llama has no model.{name}; set it to false")
    for name in ("pairing", "layout", "sharing"):
        if getattr(config.model, name) is not None:
            raise UserError(f"--against torchtitan: its Llama has no model.{name}; take a plain recipe")
    if config.parallel.context > 1:
        raise UserError("--against torchtitan: it is not compared with segments; set parallel.context 1")
    if config.train.dtype != "bfloat16":
        raise UserError("--against torchtitan: it computes in bf16; set train.dtype bfloat16")
    if config.train.document_mask:
        raise UserError("--against torchtitan: its batches are not cut; set train.document_mask false")


class Peer:
    """torchtitan's trainer, made on every rank. Raises UserError if this torchtitan has another interface."""

    def __init__(self, config: "Trainer.Config", device: torch.device) -> None:
        os.environ.setdefault("LOCAL_RANK", str(device.index))  # it reads its device from there
        self.device = device
        try:
            self._trainer = _trainer(config)
        except (ImportError, AttributeError, TypeError) as error:
            raise UserError(
                f"--against torchtitan: this version is not {VERSION}, which has another interface "
                f"({type(error).__name__}: {first_line(error)})"
            ) from error
        self._tokens = self._trainer.batch_generator(self._trainer.dataloader)

    def one(self) -> None:
        """The next step, as its training loop runs it."""
        self._trainer.step += 1
        self._trainer.gc_handler.run(self._trainer.step)
        self._trainer.train_step(self._tokens)

    def close(self) -> None:
        """Free all that it took, and give Python its garbage collection back."""
        self._trainer.close()
        del self._trainer, self._tokens
        torch._dynamo.reset()
        gc.enable()
        gc.collect()
        torch.cuda.empty_cache()


class _RandomTokens:
    """An endless row of batches as its data loader gives them, on the CPU."""

    def __init__(self, batch: int, sequence: int, vocabulary: int, seed: int) -> None:
        draw = torch.Generator().manual_seed(seed)
        self._batches = [torch.randint(vocabulary, (batch, sequence), generator=draw) for _ in range(2)]

    def __iter__(self) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        for number in count():
            tokens = self._batches[number % 2]
            yield {"input": tokens}, tokens.roll(-1, 1)


def _trainer(config: "Trainer.Config") -> Any:
    titan = importlib.import_module("torchtitan.train")
    specs = importlib.import_module("torchtitan.protocols.train_spec")
    llama = importlib.import_module("torchtitan.models.llama3")
    dimensions = importlib.import_module("torchtitan.distributed")

    train, parallel = config.train, config.parallel
    local = train.batch // (parallel.data * train.accumulate)

    def data(dp_rank: int, **_: Any) -> _RandomTokens:
        return _RandomTokens(local, train.sequence, config.model.vocabulary, 1 + dp_rank)

    name = f"flashtrain-bench-{next(_names)}"
    model = {name: _model(config, llama)}
    spec = replace(
        llama.get_train_spec(), model_args=model, build_tokenizer_fn=None, build_dataloader_fn=data
    )
    specs.register_train_spec(name, spec)

    class InThisGroup(titan.Trainer):  # type: ignore[name-defined]
        def init_distributed(self) -> Any:
            return dimensions.ParallelDims(
                dp_replicate=1,
                dp_shard=parallel.data,
                cp=1,
                tp=parallel.tensor,
                pp=1,
                ep=1,
                etp=1,
                world_size=dist.get_world_size(),
            )

    return InThisGroup(_job(config, name, local))


def _model(config: "Trainer.Config", llama: Any) -> Any:
    model = config.model
    # It rounds int(multiplier x int(8 / 3 dim)) up to a multiple of ``multiple_of``.
    multiplier = (model.mlp_width - 0.5) / int(2 * (4 * model.hidden) / 3)
    return llama.TransformerModelArgs(
        dim=model.hidden,
        n_layers=model.layers,
        n_heads=model.heads,
        n_kv_heads=model.kv_heads,
        vocab_size=model.vocabulary,
        ffn_dim_multiplier=multiplier,
        multiple_of=64,
        norm_eps=model.norm_epsilon,
        rope_theta=model.rope_theta,
    )


def _job(config: "Trainer.Config", name: str, local_batch: int) -> Any:
    train, adamw = config.train, config.optimizer
    job = importlib.import_module("torchtitan.config").JobConfig()
    job.model.name = job.model.flavor = name
    job.training.local_batch_size, job.training.seq_len = local_batch, train.sequence
    job.training.global_batch_size = train.batch
    # Without FSDP it knows no mixed precision: parameters and moments are bf16 then, else all is fp32.
    if config.parallel.data == 1:
        job.training.dtype = "bfloat16"
    job.training.steps, job.training.max_norm = 10_000, adamw.clip_norm
    job.optimizer.lr, job.optimizer.eps = adamw.learning_rate, adamw.epsilon
    job.optimizer.weight_decay = adamw.weight_decay
    job.lr_scheduler.warmup_steps = adamw.warmup
    job.parallelism.data_parallel_shard_degree = config.parallel.data
    job.parallelism.tensor_parallel_degree = config.parallel.tensor
    job.parallelism.fsdp_reshard_after_forward = "always" if config.fsdp.reshard else "never"
    job.activation_checkpoint.mode = _RECOMPUTE[train.recompute]
    job.activation_checkpoint.selective_ac_option = "op"
    job.compile.enable = True
    return job
