"""``flashtrain bench``: how fast whole training steps are, and where their time goes."""

import argparse
import json
import statistics
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashtrain.errors import UserError, first_line
from flashtrain.launch import mfu

if TYPE_CHECKING:
    from flashtrain.train.trainer import Trainer

PEERS = ("torchtitan",)


def add_parser(subparsers: Any) -> None:
    """Register the subcommand and its action."""
    parser = subparsers.add_parser(
        "bench",
        help="time whole training steps: MFU, memory, where the time goes",
        description="Measure the engine.",
    )
    actions = parser.add_subparsers(title="actions", dest="action", metavar="ACTION", required=True)
    action = actions.add_parser(
        "mfu",
        help="MFU of a recipe on random tokens",
        usage=(
            "flashtrain bench mfu RECIPE [--against torchtitan] [--steps N] [--out DIR] [--policies] "
            "[--dotted.key VALUE ...]"
        ),
        description=(
            "Train a recipe on random tokens and print step time, tokens per second, MFU, hidden and exposed "
            "communication, memory, power, and where a step's time goes. Settings are those of flashtrain "
            "train; ranks are started as it does."
        ),
    )
    action.add_argument("recipe", metavar="RECIPE", help="where settings start, such as llama-8b")
    action.add_argument("--config", type=Path, metavar="FILE.toml", help="settings to change, as TOML")
    action.add_argument(
        "--out", type=Path, metavar="DIR", help="where mfu.json and step.png go (default: runs/bench-RECIPE)"
    )
    action.add_argument(
        "--steps", type=int, default=20, metavar="N", help="steps to time (default: %(default)s)"
    )
    action.add_argument(
        "--warmup", type=int, default=5, metavar="N", help="steps before them (default: %(default)s)"
    )
    action.add_argument("--against", choices=PEERS, help="another engine with the same model, mesh and batch")
    action.add_argument(
        "--rounds",
        type=int,
        default=2,
        metavar="N",
        help="turns of each with --against (default: %(default)s)",
    )
    action.add_argument(
        "--policies", action="store_true", help="time and peak memory of each train.recompute too"
    )
    action.set_defaults(run=run, takes_settings=True)


def run(args: argparse.Namespace) -> int:
    """Check the settings, then measure: here, on the ranks of torchrun, or on new local ranks."""
    from flashtrain.launch import train

    for name in ("steps", "warmup", "rounds"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} is {getattr(args, name)}; it must be at least 1")
    config = train.resolve(args, data=False)
    _out(args).mkdir(parents=True, exist_ok=True)  # what cannot be written is not measured first
    if args.against is not None:
        from flashtrain.launch import titan

        titan.check(config)
    if not train.on_these_ranks(config.parallel):
        from flashtrain.launch import ranks

        return ranks.launch(config.parallel.world, _words(args))
    _Bench(args, config).run()
    return 0


def _words(args: argparse.Namespace) -> list[str]:
    """The command line that means ``args``."""
    options = {"config": args.config, "out": _out(args), "against": args.against}
    given = [f"--{name}={value}" for name, value in options.items() if value is not None]
    given += [f"--{name}={getattr(args, name)}" for name in ("steps", "warmup", "rounds")]
    given += ["--policies"] if args.policies else []
    return ["bench", "mfu", args.recipe, *given, *args.settings]


def _out(args: argparse.Namespace) -> Path:
    return args.out or Path("runs") / f"bench-{args.recipe}"


class _Bench:
    """What one rank does; rank 0 writes and prints what all have measured."""

    def __init__(self, args: argparse.Namespace, config: "Trainer.Config") -> None:
        self.args, self.config = args, config

    def run(self) -> None:
        import torch
        import torch.distributed as dist

        from flashtrain.comm import transport
        from flashtrain.parallel import mesh as meshes
        from flashtrain.train import ranks

        with ranks.joined(self.config.comm.timeout) as self.device:
            ranks.log_to_stderr()
            transport.configure(self.config.comm)
            self.mesh = meshes.build(self.config.parallel, self.device.type)
            self.exchange = transport.exchange_of(dist.group.WORLD.group_name)  # type: ignore[union-attr]
            if dist.get_rank() == 0:
                print(f"{self.args.recipe}: ", end="")
            line = ranks.describe(self.mesh, self.device, self.config.parallel.branches > 1)
            if dist.get_rank() == 0:
                print(line, flush=True)
            try:
                report = self._report()
            except torch.OutOfMemoryError as error:
                raise UserError(
                    "a GPU is out of memory: set train.recompute full, a smaller train.batch or more "
                    f"parallel.tensor ({first_line(error)})"
                ) from error
            if dist.get_rank() == 0:
                self._write(report)

    def _report(self) -> dict[str, Any]:
        from flashtrain.metrics.machine import describe_machine

        turns: dict[str, list[mfu.Figures]] = {}
        for _ in range(self.args.rounds if self.args.against else 1):
            turns.setdefault("flashtrain", []).append(self._ours())
            if self.args.against:
                turns.setdefault(self.args.against, []).append(self._theirs())
        report: dict[str, Any] = {
            "recipe": self.args.recipe,
            "settings": self.args.settings,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": describe_machine(),
            "systems": {name: self._rated(mfu.merged(found)) for name, found in turns.items()},
        }
        if self.args.policies:
            # The one that takes the most memory comes last: after it nothing has to be free again.
            policies = ("full", "attention", "pointwise", "none")
            report["recompute"] = {}
            for policy in policies:
                self._keep(report)  # a policy that ends the ranks leaves what was measured before
                report["recompute"][policy] = self._policy(policy)
        return report

    def _keep(self, report: dict[str, Any]) -> Path:
        """Write what there is, on rank 0; where it is."""
        import torch.distributed as dist

        path = _out(self.args) / "mfu.json"
        if dist.get_rank() == 0:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(report, indent=1) + "\n")
        return path

    def _write(self, report: dict[str, Any]) -> None:
        path = self._keep(report)
        out = path.parent
        mfu.draw(out / "step.png", report)
        for line in mfu.lines(report):
            print(line)
        print(f"wrote {path} and {out / 'step.png'}")

    def _ours(self) -> mfu.Figures:
        from flashtrain.train.workbench import Workbench, profiled

        bench = Workbench(self.config, self.mesh, self.device)
        built = bench.built
        self.model = mfu.Model(
            built.model.parameter_count(embedding=False), built.flops_per_token, built.peak
        )
        timed = bench.run(self.args.steps, self.args.warmup)
        results = bench.results
        figures = self._gathered(mfu.of_rank(timed, profiled(bench.one, 2, self.device)))
        if hidden := [result.overlap for result in results if result.overlap is not None]:
            # The transport has timed its own waiting, in steps that no profiler slowed down.
            figures["hidden"] = statistics.median(hidden)
            figures["exposed_s"] = statistics.median(result.exposed for result in results)
        del built
        attention = bench.attention
        fixed = attention.deterministic and attention.backend != "auto"
        figures["attention"] = f"{attention.backend}{', deterministic' if fixed else ''}"
        figures["skipped"] = sum(result.skipped is not None for result in results)
        bench.close()
        return figures

    def _theirs(self) -> mfu.Figures:
        from flashtrain.launch import titan
        from flashtrain.train.workbench import measure, profiled

        peer = titan.Peer(self.config, self.device)
        for _ in range(self.args.warmup):
            peer.one()
        timed = measure(peer.one, self.args.steps, self.device)
        figures = self._gathered(mfu.of_rank(timed, profiled(peer.one, 2, self.device)))
        peer.close()
        return figures

    def _policy(self, policy: Any) -> dict[str, Any]:
        """Median step time and peak memory under a recompute policy; None where memory does not suffice."""
        import torch

        from flashtrain.train.workbench import Workbench, profiled

        config = replace(self.config, train=replace(self.config.train, recompute=policy))
        bench = Workbench(config, self.mesh, self.device)
        try:
            timed = bench.run(max(3, self.args.steps // 4), 2)
        except torch.OutOfMemoryError:
            return {"step_s": None, "peak_bytes": None}
        figures = self._gathered(mfu.of_rank(timed, profiled(bench.one, 1, self.device)))
        bench.close()
        # A process on the CPU cannot forget the peak of the policy before.
        peak = figures["peak_bytes"] if self.device.type == "cuda" else None
        return {"step_s": statistics.median(figures["step_s"]), "peak_bytes": peak}

    def _gathered(self, own: mfu.Figures) -> mfu.Figures:
        return mfu.across_ranks([json.loads(text) for text in self.exchange(json.dumps(own))])

    def _rated(self, figures: mfu.Figures) -> mfu.Figures:
        tokens = self.config.train.batch * self.config.train.sequence
        return mfu.rated(figures, self.model, tokens, self.config.parallel.world)
