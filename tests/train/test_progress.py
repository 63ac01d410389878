import io
import json
import math
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from flashtrain.errors import UserError
from flashtrain.methods.callback import Callback, Run
from flashtrain.train.progress import ProgressBar, clock, describe, magnitude
from tests.train.records import METRICS, run_view


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def play(callback: Callback, run: Run, last: int | None = None) -> None:
    """Run the steps from ``run.first_step`` to ``last``, with an evaluation at every fifth."""
    callback.on_start(run)
    for step in range(run.first_step, (last or run.steps) + 1):
        callback.on_step(replace(METRICS, step=step))
        if step % 5 == 0:
            callback.on_evaluate(step, 2.5)
    callback.on_end(run)


def test_a_callback_without_state_takes_none_back(tmp_path: Path) -> None:
    callback = Callback()
    play(callback, run_view(tmp_path, steps=5))
    assert callback.state_dict() == {}
    callback.load_state_dict({})
    with pytest.raises(ValueError, match=r"Callback keeps no state, but was given \['phase'\]"):
        callback.load_state_dict({"phase": 1})


def test_plain_lines_where_there_is_no_terminal(tmp_path: Path) -> None:
    out = io.StringIO()
    play(ProgressBar(every=4, file=out), run_view(tmp_path, steps=10))
    assert "\x1b" not in out.getvalue()
    assert "\r" not in out.getvalue()
    lines = out.getvalue().splitlines()
    assert lines[0] == "a small run"
    assert [line.split("  ")[0] for line in lines[1:]] == [
        "step 4/10",
        "step 5: held-out loss 2.5000",
        "step 8/10",
        "step 10/10",
        "step 10: held-out loss 2.5000",
    ]
    for part in ("loss 3.2500", "grad norm 0.5", "12.3k tokens/s", "MFU n/a", "hidden 87.5%", "3.00 GiB"):
        assert part in lines[1]
    assert re.search(r"0:00 elapsed  0:00 remaining$", lines[4])


def test_the_last_step_of_a_failed_run_is_shown_once(tmp_path: Path) -> None:
    for last, shown in ((7, ["step 4/10", "step 7/10"]), (8, ["step 4/10", "step 8/10"])):
        out = io.StringIO()
        play(ProgressBar(every=4, file=out), run_view(tmp_path), last=last)
        assert re.findall(r"step \d+/\d+", out.getvalue()) == shown


def test_a_reader_that_has_gone_ends_the_run_with_one_line(tmp_path: Path) -> None:
    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError(32, "Broken pipe")

    bar = ProgressBar(every=4, file=Gone())
    with pytest.raises(UserError, match=r"cannot write to its standard output.*Broken pipe\): send"):
        bar.on_start(run_view(tmp_path))
    bar.on_step(replace(METRICS, step=4))  # what the end of the run still tells goes nowhere
    bar.on_end(run_view(tmp_path))


def test_standard_output_is_the_default(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    play(ProgressBar(), run_view(tmp_path))
    assert "step 10/10" in capsys.readouterr().out


def test_remaining_time_leaves_out_the_first_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    out = io.StringIO()
    bar = ProgressBar(every=1, file=out)
    bar.on_start(run_view(tmp_path, first_step=101, steps=200))
    for step, now in ((101, 60.0), (102, 62.0), (103, 64.0)):  # noqa: B007 read by the clock above
        bar.on_step(replace(METRICS, step=step))
    ends = [line.split("  ")[-2:] for line in out.getvalue().splitlines()[1:]]
    assert ends == [
        ["1:00 elapsed", "-:-- remaining"],
        ["1:02 elapsed", "3:16 remaining"],
        ["1:04 elapsed", "3:14 remaining"],
    ]


def test_a_terminal_gets_a_bar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    out = Terminal()
    play(ProgressBar(file=out), run_view(tmp_path, first_step=3))
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out.getvalue())
    assert "\x1b" in out.getvalue()
    for part in ("a small run", "2/10", "10/10", "loss 3.2500", "step 5: held-out loss 2.5000"):
        assert part in text
    assert sys.stdout is not out


def test_a_terminal_that_cannot_move_its_cursor_gets_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "dumb")
    out = Terminal()
    play(ProgressBar(every=4, file=out), run_view(tmp_path))
    assert "\x1b" not in out.getvalue()
    assert re.findall(r"step \d+/\d+", out.getvalue()) == ["step 4/10", "step 8/10", "step 10/10"]


def test_numbers_for_reading() -> None:
    known = describe(replace(METRICS, mfu=0.413, overlap=None, memory_bytes=None, loss=math.nan))
    assert known[0] == "loss nan"
    assert known[-3:] == ["MFU 41.3%", "hidden n/a", "memory n/a"]
    values = (0.5, 12, 999, 1000, 12_345, 999_400, 2_000_000, 3.5e9)
    assert [magnitude(value) for value in values] == ["0.5", "12", "999", "1k", "12.3k", "999k", "2M", "3.5G"]
    assert [clock(seconds) for seconds in (0, 59.6, 3599, 3600)] == ["0:00", "1:00", "59:59", "1:00:00"]
    with pytest.raises(UserError, match="every must be at least 1"):
        ProgressBar(every=0)


def test_importing_callbacks_and_the_trainer_and_counting_a_model_import_no_heavy_package() -> None:
    heavy = ["rich", "matplotlib", "tensorboard", "torch.utils.tensorboard"]
    compiler = ["torch._dynamo", "torch._inductor"]
    program = (
        "import json, sys, flashtrain.train.progress, flashtrain.train.sinks;"
        f"found = [name for name in {heavy} if name in sys.modules];"
        "import flashtrain.train.trainer, flashtrain.recipes;"
        "flashtrain.recipes.RECIPES['demo']().check_room(1);"
        f"print(json.dumps(found + [name for name in {compiler} if name in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []
