"""The training loop: what runs in which order. The step, side effects and storage stand beside it."""

import contextlib
import logging
import os
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from flashtrain import config as configs
from flashtrain.checkpoint import BackgroundSaver, CheckpointStore
from flashtrain.checkpoint.files import user_errors
from flashtrain.comm import transport
from flashtrain.comm.transport.base import clock
from flashtrain.data import Corpus, PreparedData, open_source
from flashtrain.data.source import HeldOut, resolved
from flashtrain.data.tokenizer import keep_tokenizer
from flashtrain.errors import Stopped, TransportError, UserError
from flashtrain.methods.callback import Callback, Run
from flashtrain.methods.progressive_sharing import ProgressiveSharing
from flashtrain.metrics import Event, StepMetrics, peak_memory
from flashtrain.metrics.history import CONFIG
from flashtrain.metrics.machine import describe_machine
from flashtrain.models.decoder import Decoder
from flashtrain.nn import attend
from flashtrain.nn.attend import Documents
from flashtrain.parallel import mesh as meshes
from flashtrain.parallel import sites
from flashtrain.parallel.data import Sharding
from flashtrain.parallel.mesh import DATA, Degrees
from flashtrain.train import attention, faults, ranks, snapshot
from flashtrain.train import places as where
from flashtrain.train.build import build_model, build_step, start_from
from flashtrain.train.faults import Fault
from flashtrain.train.optimizer import AdamW
from flashtrain.train.settings import Checkpointing, Training
from flashtrain.train.skips import SkipRule
from flashtrain.train.step import Batch, StepResult, StepUnderWay, mean_over_data
from flashtrain.train.stopping import StopRequest
from flashtrain.train.stragglers import Stragglers
from flashtrain.train.summary import Summary
from flashtrain.train.watch import Watching, build_callbacks

log = logging.getLogger("flashtrain.train")


@dataclass(frozen=True)
class _Begun:
    """A step under way: when the host began with it, and the step whose times its notes have."""

    step: int
    rate: float
    at: float
    running: StepUnderWay
    timed: int


def _behind(device: torch.device) -> int:
    """Steps whose results are unread while the next one runs: a GPU is not to wait for the host."""
    return 1 if device.type == "cuda" else 0


@contextlib.contextmanager
def _named(step: int) -> Iterator[None]:
    """Say which step a peer failed in."""
    try:
        yield
    except TransportError as error:
        raise TransportError(f"training step {step}: {error}") from error


class Trainer:
    """Trains a decoder on text or prepared sets. Made and run once, on every rank."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """All that decides what a run computes.

        ``parallel``, ``comm``, ``attention``, ``fsdp`` and ``watch`` only decide how.

        ``sharing``: when layers of ``model.sharing`` begin to share; None: all do from the first step on.
        ``nodes``: how many hosts the ranks must have come from; None: as many as there are.
        """

        model: Decoder.Config = field(default_factory=Decoder.Config)
        data: Corpus.Config | PreparedData.Config = field(default_factory=Corpus.Config)
        train: Training = field(default_factory=Training)
        optimizer: AdamW.Config = field(default_factory=AdamW.Config)
        parallel: Degrees = field(default_factory=Degrees)
        comm: transport.Settings = field(default_factory=transport.Settings)
        attention: attend.Settings = field(default_factory=attend.Settings)
        fsdp: Sharding = field(default_factory=Sharding)
        checkpoint: Checkpointing = field(default_factory=Checkpointing)
        watch: Watching = field(default_factory=Watching)
        skip: SkipRule.Config = field(default_factory=SkipRule.Config)
        sharing: ProgressiveSharing.Config | None = None
        stragglers: Stragglers.Config = field(default_factory=Stragglers.Config)
        faults: tuple[Fault, ...] = ()
        nodes: int | None = None

        def validate(self, data: bool = True) -> None:
            """Raise UserError for settings that cannot work, before any rank starts.

            Without ``data`` nothing is read: for what trains on tokens of its own.
            """
            self.parallel.validate()
            self.model.validate(self.parallel.tensor)
            self.train.validate(self.parallel.data)
            self.optimizer.validate()
            self.comm.validate()
            self.fsdp.validate()
            self.checkpoint.validate()
            self.watch.validate(self.train.steps)
            self.skip.validate()
            self.stragglers.validate()
            if self.sharing is not None:
                given = self.model.sharing
                self.sharing.validate(0 if given is None else len(given.targets_of(self.model.layers)))
            faults.validate(self.faults, self.parallel.world)
            for name in ("pairing", "layout", "sharing"):
                if self.train.document_mask and getattr(self.model, name) is not None:
                    raise UserError(f"train.document_mask is true, but model.{name} knows no documents")
            if not data:
                return
            source = open_source(self.data)
            if self.model.vocabulary < source.tokenizer.vocab_size:
                raise UserError(
                    f"model.vocabulary is {self.model.vocabulary}; it must be at least the tokenizer's "
                    f"{source.tokenizer.vocab_size}"
                )
            if self.train.document_mask:
                source.check_boundaries()
            source.samples(self.train.sequence, self.train.seed)
            source.held_out(self.train.sequence, 1)

    def __init__(self, config: Config, out: Path) -> None:
        self.config, self.out = replace(config, data=resolved(config.data)), Path(out)
        self._read_at = 0.0  # when the latest result was read

    def run(self) -> None:
        """Train to the last step, going on from the latest checkpoint in ``out`` if there is one.

        Raises UserError for bad input and TransportError if a peer fails.
        """
        with ranks.joined(self.config.comm.timeout) as device:
            ranks.log_to_stderr()
            transport.configure(self.config.comm)
            places = where.survey(device)
            for line in where.describe(places) if len(places) > 1 else ():
                log.info("%s", line)
            where.check(places, self.config.nodes)
            self._build(device)
            first_step, states = self._resume()
            self.reached = first_step
            waiting = self._callbacks(states)
            self.callbacks: list[Callback] = []  # those that were started, and are to be ended
            unwritable = f"cannot write the records of the run in {self.out} (checkpoints are unchanged)"
            with user_errors(unwritable):
                run = self._describe(first_step)
            try:
                with user_errors(unwritable), StopRequest() as self.stop:
                    for callback in waiting:
                        self.callbacks.append(callback)
                        callback.on_start(run)
                    self._announce_beginning(first_step)
                    measured, held_out = self._loop(first_step)
            except BaseException as error:
                self._announce_failure(error)
                raise
            finally:
                if self.saver is not None:
                    self.saver.close()
                for callback in self.callbacks:
                    callback.on_end(run)
            latest, rank = self.store.latest(), dist.get_rank()
        if rank == 0 and latest is not None:
            Summary(self.out, latest, held_out, self.unigram_entropy, measured).show()

    def _build(self, device: torch.device) -> None:
        config, train = self.config, self.config.train
        self.device = device
        self.mesh = meshes.build(config.parallel, device.type)
        self.source = open_source(config.data)
        self.samples = self.source.samples(train.sequence, train.seed)
        held_out = self.source.held_out(train.sequence, train.evaluation_windows)
        self.unigram_entropy = held_out.unigram_entropy
        self.held_out = self._evaluation_batches(held_out)

        attention.prepare(config.attention, config.model, train, config.parallel, device)
        built = build_model(config.model, train, config.fsdp, self.mesh, device)
        self.model, self.parameter_count = built.model, built.parameter_count
        self.flops_per_token, self.peak = built.flops_per_token, built.peak
        start_from(train.init_from, self.model, self.out)
        self.step = build_step(self.model, self.mesh, config.optimizer, config.skip, config.faults, self.out)
        self.optimizer, self.skips, self.faults = self.step.optimizer, self.step.skips, self.step.faults
        self.stragglers = Stragglers(config.stragglers)
        checkpoints = self.out / snapshot.CHECKPOINTS
        self.store = CheckpointStore(checkpoints, keep=config.checkpoint.keep)
        self.saver: BackgroundSaver | None = None
        if config.checkpoint.background:
            group = dist.new_group(backend="gloo", timeout=timedelta(seconds=config.comm.timeout))
            self.saver = BackgroundSaver(CheckpointStore(checkpoints, config.checkpoint.keep, group))

    def _resume(self) -> tuple[int, dict[str, Any]]:
        path = self.store.latest()
        if path is None:
            return 1, {}
        manifest = snapshot.restore(self.store, path, self.model, self.optimizer)
        log.info("resuming after step %d from %s", manifest.step, path)
        for change in snapshot.changes(manifest.meta["config"], configs.to_dict(self.config)):
            log.warning("setting differs from the checkpoint's: %s", change)
        if skips := manifest.meta.get("skips"):
            self.skips.load_state_dict(skips)
        return manifest.step + 1, manifest.meta["callbacks"]

    def _callbacks(self, states: dict[str, Any]) -> list[Callback]:
        train = self.config.train
        rows = train.batch // (self.config.parallel.data * train.accumulate) * train.sequence
        survey = sites.survey(self.model, self.mesh, rows, self.device)
        callbacks: list[Callback] = []
        if self.config.sharing is not None:
            callbacks.append(ProgressiveSharing(self.config.sharing, self.model))
        callbacks += build_callbacks(
            self.config.watch, dist.get_rank(), self.device, survey, self.unigram_entropy
        )
        for callback in callbacks:
            if (name := type(callback).__name__) in states:
                callback.load_state_dict(states[name])
        return callbacks

    def _announce(self, kind: str, step: int, **detail: Any) -> None:
        """Tell the callbacks of an event; see ``flashtrain.metrics.events`` for the kinds."""
        event = Event(kind, step, detail)
        for callback in self.callbacks:
            callback.on_event(event)

    def _announce_beginning(self, first_step: int) -> None:
        detail: dict[str, Any] = {"ranks": dist.get_world_size(), "machine": describe_machine()}
        if "TORCHELASTIC_RESTART_COUNT" in os.environ:
            detail["restart"] = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
        self._announce("start" if first_step == 1 else "resume", first_step, **detail)

    def _announce_failure(self, error: BaseException) -> None:
        if isinstance(error, Stopped):
            return  # told as "preempted"
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        # A disk that is full or gone must not hide the error that ended the run.
        with contextlib.suppress(OSError):
            self._announce("failure", self.reached, reason=reason)

    def _describe(self, first_step: int) -> Run:
        description = (
            f"{self.parameter_count / 1e6:.2f} M parameters; {ranks.describe(self.mesh, self.device)}; "
            f"{self.source.describe()}"
        )
        if dist.get_rank() == 0:
            self.out.mkdir(parents=True, exist_ok=True)
            keep_tokenizer(self.source.tokenizer, self.out)
            configs.save(self.config, self.out / CONFIG)
        text = (self.out / CONFIG).read_text() if dist.get_rank() == 0 else ""
        return Run(self.out, first_step, self.config.train.steps, text, description)

    def _loop(self, first_step: int) -> tuple[list[StepMetrics], float]:
        train, every, callbacks = self.config.train, self.config.checkpoint.every, self.callbacks
        measured: list[StepMetrics] = []
        under_way: deque[_Begun] = deque()
        behind = _behind(self.device)
        held_out = self._evaluate() if first_step > train.steps else float("nan")
        for step in range(first_step, train.steps + 1):
            self.reached = step
            for callback in callbacks:
                callback.before_step(step)
            begun = clock()
            self.faults.before_step(step)
            rate = self.config.optimizer.learning_rate_at(step, train.steps)
            with _named(step):
                running = self.step.begin(step, rate, self._batches(step), lambda: self._notes(measured))
            timed = measured[-1].step if measured else 0
            under_way.append(_Begun(step, rate, begun, running, timed))
            last = step == train.steps
            evaluates = last or (train.evaluate_every and step % train.evaluate_every == 0)
            saves = last or (every and step % every == 0)
            # The same on every rank, and so is which step's notes are known when.
            wait = evaluates or saves or any(callback.waits_for(step) for callback in callbacks)
            stopping = self._read(under_way, 0 if wait else behind, measured)
            if stopping:
                self._read(under_way, 0, measured)
            if evaluates:
                held_out = self._evaluate()
                for callback in callbacks:
                    callback.on_evaluate(step, held_out)
            if stopping or saves:
                self._save(step)
            if stopping and not last:
                self._finish_save()
                self._announce("preempted", step, reason=f"SIGTERM on rank {stopping[0]}")
                log.info("SIGTERM: saved after step %d; the same command goes on from there", step)
                raise Stopped(f"stopped by SIGTERM after step {step}")
        self._finish_save()
        self._announce("end", train.steps)
        return measured, held_out

    def _read(self, under_way: deque["_Begun"], leave: int, measured: list[StepMetrics]) -> list[int]:
        """Report the steps under way but the last ``leave``; the ranks that were asked to stop by then."""
        stopping: list[int] = []
        while len(under_way) > leave:
            begun = under_way.popleft()
            with _named(begun.step):
                result = begun.running.result()
            now = clock()
            # A step that was enqueued beside the one before runs from the end of that one.
            seconds, self._read_at = now - max(begun.at, self._read_at), now
            metrics = self._measure(begun.step, begun.rate, result, seconds)
            measured.append(metrics)
            for callback in self.callbacks:
                callback.on_step(metrics)
            self._watch(begun, result)
            stopping += [rank for rank, (_, stop, _) in enumerate(result.notes) if stop]
        return stopping

    def _notes(self, measured: list[StepMetrics]) -> tuple[float, bool, bool]:
        """What this rank tells all others at each step: its own time for the last step that it has measured,
        without waiting for others, whether it was asked to stop, and whether its part of a save has failed.
        """
        own_seconds = measured[-1].step_s - measured[-1].exposed_s if measured else 0.0
        return own_seconds, self.stop.requested, self.saver is not None and self.saver.failed

    def _watch(self, begun: "_Begun", result: StepResult) -> None:
        """Tell what happened beside the arithmetic of a step; take in a save in the background."""
        step = begun.step
        if result.skipped is not None:
            self._announce("skipped_step", step, reason=result.skipped, total=self.skips.count)
        if dist.get_rank() == 0 and result.skipped is not None:
            log.warning("step %d made no update: the %s", step, result.skipped)
        own_seconds, _, lost = zip(*result.notes, strict=True)
        # Times are those of a step before; the first step has none before it.
        for late in self.stragglers.observe(own_seconds) if any(own_seconds) else ():
            self._announce("straggler", begun.timed, **asdict(late))
            log.info("%s", late)
        if any(lost) or (self.saver is not None and self.saver.done):
            self._finish_save()

    def _save(self, step: int) -> None:
        states = {type(callback).__name__: callback.state_dict() for callback in self.callbacks}
        self._finish_save()
        started = clock()
        target = self.store if self.saver is None else self.saver
        snapshot.save(target, step, self.model, self.optimizer, self.config, states, self.skips.state_dict())
        if self.saver is None:
            self._announce("checkpoint", step, seconds=round(clock() - started, 3))

    def _finish_save(self) -> None:
        """Wait for a save in the background. Raises its error, on all ranks alike."""
        saved = None if self.saver is None else self.saver.finish()
        if saved is not None:
            self._announce("checkpoint", saved.step, seconds=round(saved.seconds, 3))

    def _batches(self, step: int) -> list[Batch]:
        """This rank's micro-batches of ``step``. Samples are numbered over the whole run and all ranks."""
        train = self.config.train
        share = train.batch // self.config.parallel.data
        size = share // train.accumulate
        first = (step - 1) * train.batch + self.mesh[DATA].get_local_rank() * share
        return [self._on_device(*self.samples.batch(first + i * size, size)) for i in range(train.accumulate)]

    def _on_device(self, tokens: Tensor, targets: Tensor) -> Batch:
        """``[B, S]`` as the sampler gives it -> ``[S, B]`` as the model takes it."""
        taken = tokens.t().contiguous(), targets.t().contiguous()
        if self.device.type == "cuda":  # from pinned memory, so that the host does not wait
            taken = taken[0].pin_memory(), taken[1].pin_memory()
        batch = taken[0].to(self.device, non_blocking=True), taken[1].to(self.device, non_blocking=True)
        if not self.config.train.document_mask:
            return batch
        return *batch, Documents.of(tokens, self.source.tokenizer.boundary, self.device)

    def _evaluation_batches(self, held_out: HeldOut) -> list[Batch]:
        """This data rank's share of the held-out windows, in batches of the training step's size."""
        train, degree = self.config.train, self.config.parallel.data
        share = max(1, len(held_out.inputs) // degree)
        size = train.batch // (degree * train.accumulate)
        first = self.mesh[DATA].get_local_rank() * share
        mine = [part[first : first + share].split(size) for part in (held_out.inputs, held_out.targets)]
        return [self._on_device(*batch) for batch in zip(*mine, strict=True)]

    @torch.no_grad()
    def _evaluate(self) -> float:
        """Held-out loss in nats per token over the windows of all data ranks."""
        total, count = torch.zeros((), dtype=torch.float64, device=self.device), 0
        for batch in self.held_out:
            windows = batch[0].shape[1]
            total += self.model(*batch).double() * windows
            count += windows
        return float(mean_over_data(total / count, self.mesh))

    def _measure(self, step: int, rate: float, result: StepResult, seconds: float) -> StepMetrics:
        tokens = self.config.train.batch * self.config.train.sequence
        # Asked each step, since it may change on the way.
        flops = (
            tokens * self.model.flops_per_token(self.config.train.sequence) / dist.get_world_size() / seconds
        )
        return StepMetrics(
            step=step,
            loss=result.loss,
            grad_norm=result.grad_norm,
            learning_rate=rate,
            tokens=step * tokens,
            tokens_per_s=tokens / seconds,
            tflops_per_s=flops / 1e12,
            mfu=None if self.peak is None else flops / self.peak,
            overlap=result.overlap,
            exposed_s=result.exposed,
            overhead=1.0 - result.arithmetic / seconds,
            memory_bytes=peak_memory(self.device),
            step_s=seconds,
        )
