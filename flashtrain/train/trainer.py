"""The training loop: what runs in which order. The step, side effects and storage stand beside it."""

import contextlib
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from flashtrain import config as configs
from flashtrain.checkpoint import BackgroundSaver, CheckpointStore
from flashtrain.checkpoint.files import user_errors
from flashtrain.comm import transport
from flashtrain.comm.transport.base import clock
from flashtrain.data import Corpus, PreparedData, open_source
from flashtrain.data.source import resolved
from flashtrain.data.tokenizer import keep_tokenizer
from flashtrain.errors import Stopped, UserError
from flashtrain.methods.callback import Callback, Run
from flashtrain.methods.progressive_sharing import ProgressiveSharing
from flashtrain.metrics import Event
from flashtrain.metrics.history import CONFIG
from flashtrain.metrics.machine import describe_machine
from flashtrain.models.decoder import Decoder
from flashtrain.nn import attend
from flashtrain.parallel import mesh as meshes
from flashtrain.parallel import sites
from flashtrain.parallel.data import Sharding, release
from flashtrain.parallel.mesh import Degrees
from flashtrain.train import attention, faults, ranks, snapshot
from flashtrain.train import places as where
from flashtrain.train.batches import Batches
from flashtrain.train.build import build_model, build_step, check_room, start_from
from flashtrain.train.claim import claimed, unwritable
from flashtrain.train.faults import Fault
from flashtrain.train.optimizer import AdamW
from flashtrain.train.results import Reading, Results, named
from flashtrain.train.settings import Checkpointing, Training
from flashtrain.train.skips import SkipRule
from flashtrain.train.stopping import StopRequest
from flashtrain.train.stragglers import Stragglers
from flashtrain.train.summary import Summary
from flashtrain.train.watch import Watching, build_callbacks

log = logging.getLogger("flashtrain.train")


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
            if self.parallel.branches > 1:
                self.model.validate_branches(self.parallel.branches)
            self.train.validate(self.parallel.data, self.parallel.context)
            if self.parallel.context > 1:
                self.model.validate_context(self.parallel.context, self.train.sequence)
            self.optimizer.validate()
            self.comm.validate()
            self.fsdp.validate()
            self.checkpoint.validate()
            self.watch.validate(self.train.steps)
            self.skip.validate()
            self.stragglers.validate()
            given = self.model.sharing
            if self.sharing is not None:
                self.sharing.validate(0 if given is None else len(given.targets_of(self.model.layers)))
                if given is not None and given.kv_origin == "fresh":
                    raise UserError(
                        "model.sharing.kv_origin is fresh, but the source moves as layers begin to share one "
                        "after the other: leave out sharing, or set kv_origin to layer"
                    )
            elif given is not None and given.init == "mean" and self.train.init_from is None:
                raise UserError(
                    "model.sharing.init is mean, which is of trained weights: set train.init_from, or a "
                    "schedule, sharing"
                )
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

        def check_room(self, ranks: int) -> None:
            """Raise UserError if this machine has no memory for ``ranks`` of the ranks."""
            check_room(self.model, ranks / self.parallel.world)

    def __init__(self, config: Config, out: Path) -> None:
        self.config, self.out = replace(config, data=resolved(config.data)), Path(out)

    def run(self) -> None:
        """Train to the last step, going on from the latest checkpoint in ``out`` if there is one.

        Raises UserError for bad input and TransportError if a peer fails.
        """
        with ranks.joined(self.config.comm.timeout) as device, claimed(self.out):
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
            with user_errors(unwritable(self.out)):
                run = self._describe(first_step)
            try:
                with user_errors(unwritable(self.out)), StopRequest() as self.stop:
                    for callback in waiting:
                        self.callbacks.append(callback)
                        callback.on_start(run)
                    self._announce_beginning(first_step)
                    held_out = self._loop(first_step)
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
            Summary(self.out, latest, held_out, self.batches.unigram_entropy, self.results.measured).show()

    def _build(self, device: torch.device) -> None:
        config, train = self.config, self.config.train
        self.device = device
        self.mesh = meshes.build(config.parallel, device.type)
        self.source = open_source(config.data)
        self.batches = Batches(self.source, train, self.mesh, device)

        attention.prepare(config.attention, config.model, train, config.parallel, device)
        by_branches = config.parallel.branches > 1
        built = build_model(config.model, train, config.fsdp, self.mesh, device, by_branches)
        self.model, self.parameter_count = built.model, built.parameter_count
        self.results = Results(built, train, device)
        means = start_from(train.init_from, self.model, self.out, shares=config.sharing is None)
        self.step = build_step(self.model, self.mesh, config.optimizer, config.skip, config.faults, self.out)
        self.optimizer, self.skips, self.faults = self.step.optimizer, self.step.skips, self.step.faults
        self.set_to_means(means)
        self.stragglers = Stragglers(config.stragglers)
        checkpoints = self.out / snapshot.CHECKPOINTS
        self.store = CheckpointStore(checkpoints, keep=config.checkpoint.keep)
        self.saver: BackgroundSaver | None = None
        if config.checkpoint.background:
            group = dist.new_group(backend="gloo", timeout=timedelta(seconds=config.comm.timeout))
            self.saver = BackgroundSaver(CheckpointStore(checkpoints, config.checkpoint.keep, group))

    def set_to_means(self, means: Mapping[str, Sequence[str]]) -> None:
        """Between steps; see ``AdamW.set_to_means``."""
        release(self.model)
        self.optimizer.set_to_means(means)

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
        parallel = self.config.parallel
        rows = train.batch // (parallel.data * train.accumulate) * (train.sequence // parallel.context)
        survey = sites.survey(self.model, self.mesh, rows, self.device)
        callbacks: list[Callback] = []
        if self.config.sharing is not None:
            callbacks.append(ProgressiveSharing(self.config.sharing, self.model, self.set_to_means))
        callbacks += build_callbacks(
            self.config.watch, dist.get_rank(), self.device, survey, self.batches.unigram_entropy
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
        by_branches = self.config.parallel.branches > 1
        description = (
            f"{self.parameter_count / 1e6:.2f} M parameters; "
            f"{ranks.describe(self.mesh, self.device, by_branches)}; "
            f"{self.source.describe()}"
        )
        if dist.get_rank() == 0:
            self.out.mkdir(parents=True, exist_ok=True)
            keep_tokenizer(self.source.tokenizer, self.out)
            configs.save(self.config, self.out / CONFIG)
        text = (self.out / CONFIG).read_text() if dist.get_rank() == 0 else ""
        return Run(self.out, first_step, self.config.train.steps, text, description)

    def _loop(self, first_step: int) -> float:
        train, every, callbacks = self.config.train, self.config.checkpoint.every, self.callbacks
        held_out = self.batches.held_out_loss(self.model) if first_step > train.steps else float("nan")
        for step in range(first_step, train.steps + 1):
            self.reached = step
            for callback in callbacks:
                callback.before_step(step)
            begun = clock()
            self.faults.before_step(step)
            rate = self.config.optimizer.learning_rate_at(step, train.steps)
            with named(step):
                running = self.step.begin(step, rate, self.batches.of(step), self._notes)
            self.results.expect(step, rate, begun, running)
            last = step == train.steps
            evaluates = last or (train.evaluate_every and step % train.evaluate_every == 0)
            saves = last or (every and step % every == 0)
            # The same on every rank, and so is which step's notes are known when.
            wait = evaluates or saves or any(callback.waits_for(step) for callback in callbacks)
            stopping = self._read(all_of_them=bool(wait))
            if stopping:
                self._read(all_of_them=True)
            if evaluates:
                held_out = self.batches.held_out_loss(self.model)
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
        return held_out

    def _read(self, all_of_them: bool) -> list[int]:
        """Report the steps whose turn it is; the ranks that were asked to stop by then."""
        stopping: list[int] = []
        for reading in self.results.read(all_of_them):
            for callback in self.callbacks:
                callback.on_step(reading.metrics)
            self._watch(reading)
            stopping += [rank for rank, (_, stop, _) in enumerate(reading.result.notes) if stop]
        return stopping

    def _notes(self) -> tuple[float, bool, bool]:
        """What this rank tells all others at each step: its own time for the last step that it has measured,
        without waiting for others, whether it was asked to stop, and whether its part of a save has failed.
        """
        measured = self.results.measured
        own_seconds = measured[-1].step_s - measured[-1].exposed_s if measured else 0.0
        return own_seconds, self.stop.requested, self.saver is not None and self.saver.failed

    def _watch(self, reading: Reading) -> None:
        """Tell what happened beside the arithmetic of a step; take in a save in the background."""
        step, result = reading.metrics.step, reading.result
        if result.skipped is not None:
            self._announce("skipped_step", step, reason=result.skipped, total=self.skips.count)
        if dist.get_rank() == 0 and result.skipped is not None:
            log.warning("step %d made no update: the %s", step, result.skipped)
        own_seconds, _, lost = zip(*result.notes, strict=True)
        # Times are those of a step before; the first step has none before it.
        for late in self.stragglers.observe(own_seconds) if any(own_seconds) else ():
            self._announce("straggler", reading.timed, **asdict(late))
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
