"""Callbacks that show a run elsewhere while it runs: Weights & Biases, Prometheus."""

import logging
import tomllib
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from flashtrain.errors import UserError
from flashtrain.methods.callback import Callback, Run
from flashtrain.metrics.events import Event
from flashtrain.metrics.report import StepMetrics
from flashtrain.train.sinks import TensorBoard

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

_log = logging.getLogger(__name__)

LOOPBACK = "127.0.0.1"


class WeightsAndBiases(Callback):
    """Logs to a project of Weights & Biases, under the tags that TensorBoard has.

    Whether it goes over the network is wandb's own setting: WANDB_MODE=offline or ``wandb offline`` keeps
    all in out/wandb, for ``wandb sync`` later. A resumed run goes on in the same record; the steps that it
    does again appear there twice, because a record can only be added to.
    """

    def __init__(self, project: str) -> None:
        self.project = project
        self._id: str | None = None
        self._run: Any = None
        self._happened: dict[str, int] = {}

    def on_start(self, run: Run) -> None:
        try:
            import wandb
        except ImportError as error:
            raise UserError("watch.wandb needs wandb: pip install 'flashtrain[wandb]'") from error
        run.out.mkdir(parents=True, exist_ok=True)
        try:
            self._run = wandb.init(
                project=self.project,
                name=run.out.name,
                notes=run.description,
                dir=str(run.out),
                id=self._id,
                resume="allow" if self._id else None,
                config=tomllib.loads(run.config_text),
                settings=wandb.Settings(console="off", silent=True, save_code=False),
            )
        except wandb.Error as error:
            reason = " ".join(str(error).split())
            raise UserError(
                f"Weights & Biases: {reason}; run `wandb login`, or set WANDB_MODE=offline"
            ) from error
        self._id = self._run.id
        # Its own step counter refuses to go back after a resume.
        self._run.define_metric("*", step_metric="step")
        mode = "offline, in out/wandb" if self._run.offline else self._run.url
        _log.info("Weights & Biases: project %s, run %s, %s", self.project, self._id, mode)

    def on_step(self, metrics: StepMetrics) -> None:
        values = {tag: getattr(metrics, name) for name, tag in TensorBoard.TAGS.items()}
        self._send(metrics.step, {tag: value for tag, value in values.items() if value is not None})

    def on_evaluate(self, step: int, loss: float) -> None:
        self._send(step, {"loss/held_out": loss})

    def on_event(self, event: Event) -> None:
        count = self._happened[event.kind] = self._happened.get(event.kind, 0) + 1
        self._send(event.step, {f"events/{event.kind}": count})

    def on_end(self, run: Run) -> None:
        if self._run is not None:
            self._run.finish()
            self._run = None

    def state_dict(self) -> dict[str, Any]:
        return {"id": self._id}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._id = state.get("id")

    def _send(self, step: int, values: dict[str, Any]) -> None:
        if self._run is not None:
            self._run.log({"step": step, **values})


class Prometheus(Callback):
    """Serves the last step's metrics to a Prometheus server, at http://ADDRESS:PORT/metrics, on rank 0.

    Each metric is a gauge ``flashtrain_NAME``; ``flashtrain_events_total`` counts events by kind since this
    process began. Port 0 takes a free one, which the log names. Any address but loopback shows the run to
    whoever reaches it: there is no password.
    """

    def __init__(self, port: int, address: str = LOOPBACK) -> None:
        self.port, self.address = port, address
        self._server: Any = None

    def on_start(self, run: Run) -> None:
        try:
            import prometheus_client as prometheus
        except ImportError as error:
            raise UserError(
                "watch.prometheus_port needs prometheus-client: pip install 'flashtrain[prometheus]'"
            ) from error
        registry = prometheus.CollectorRegistry()
        self._gauges = _gauges(registry)
        self._gauges["steps"].set(run.steps)
        self._events = prometheus.Counter(
            "flashtrain_events", "Events of the run", ["kind"], registry=registry
        )
        try:
            self._server, thread = prometheus.start_http_server(self.port, self.address, registry)
        except OSError as error:
            raise UserError(
                f"the Prometheus endpoint cannot listen on {self.address} port {self.port}: "
                f"{error.strerror}; choose another watch.prometheus_port, or 0 for a free one"
            ) from error
        self.port = self._server.server_port
        thread.name = "flashtrain-prometheus"
        _log.info("Prometheus endpoint: http://%s:%d/metrics", self.address, self.port)

    def on_step(self, metrics: StepMetrics) -> None:
        for field in fields(metrics):
            value = getattr(metrics, field.name)
            self._gauges[field.name].set(float("nan") if value is None else value)

    def on_evaluate(self, step: int, loss: float) -> None:
        self._gauges["held_out_loss"].set(loss)

    def on_event(self, event: Event) -> None:
        if self._server is not None:
            self._events.labels(event.kind).inc()

    def on_end(self, run: Run) -> None:
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None


def _gauges(registry: "CollectorRegistry") -> dict[str, Any]:
    """A gauge for each metric of a step, for the held-out loss and for the number of steps; NaN: unknown."""
    from prometheus_client import Gauge

    words = {
        "step": "Last step that was done",
        "loss": "Training loss of the last step, nats per token",
        "grad_norm": "Norm of the gradient before clipping",
        "learning_rate": "Learning rate of the last step",
        "tokens": "Tokens trained on since the start of training",
        "tokens_per_s": "Tokens per second over all ranks",
        "tflops_per_s": "Model TFLOP/s per rank",
        "mfu": "Model FLOP/s over the device's dense peak",
        "overlap": "Share of the communication time that is hidden",
        "exposed_s": "Communication time that is not hidden, seconds",
        "overhead": "Share of the step that is not model arithmetic",
        "memory_bytes": "Peak memory of rank 0, bytes",
        "step_s": "Duration of the step, seconds",
        "held_out_loss": "Held-out loss of the last evaluation, nats per token",
        "steps": "Number of the run's last step",
    }
    names = [field.name for field in fields(StepMetrics)] + ["held_out_loss", "steps"]
    gauges = {name: Gauge(f"flashtrain_{name}", words.get(name, name), registry=registry) for name in names}
    for gauge in gauges.values():
        gauge.set(float("nan"))
    return gauges
