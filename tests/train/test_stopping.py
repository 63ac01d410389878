"""Requests to stop: taken as often as they come, and never in the way of a save."""

import os
import signal
import threading
from pathlib import Path

import pytest

from flashtrain.checkpoint import BackgroundSaver, CheckpointStore
from flashtrain.train.stopping import StopRequest
from tests.checkpoint.faults import in_child, watch
from tests.checkpoint.test_kill import assert_loads, tensors_of


def test_sigterm_is_a_wish_inside_and_the_end_outside() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with StopRequest() as stop:
        assert not stop.requested
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("background", [False, True])
def test_a_signal_at_every_change_of_a_save_leaves_it_whole(tmp_path: Path, background: bool) -> None:
    store = CheckpointStore(tmp_path, keep=1)
    store.save(1, tensors_of(1), {})

    def save() -> None:
        changes = []

        def on_change(operation: str, path: str) -> None:
            changes.append(path)
            os.kill(os.getpid(), signal.SIGTERM)

        with StopRequest() as stop:
            watch(tmp_path, on_change)
            if background:
                saver = BackgroundSaver(store)
                saver.save(2, tensors_of(2), {})
                saver.finish()
            else:
                store.save(2, tensors_of(2), {})
        assert stop.requested
        assert len(changes) > 20

    assert in_child(save) == 0
    assert_loads(store, {2})


def test_a_run_in_another_thread_says_that_it_cannot_take_the_signal(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def enter() -> None:
        with caplog.at_level("INFO", logger="flashtrain.train"), StopRequest():
            pass

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert "it does not run in the main thread" in caplog.text
