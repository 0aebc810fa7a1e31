"""What a press of Ctrl-C does."""

import os
import signal

import pytest

from trainer.signals import Signals


@pytest.fixture
def codes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The exit codes with which the process would have ended."""
    found: list[int] = []
    monkeypatch.setattr(os, "_exit", found.append)
    return found


def test_ctrl_c_is_acknowledged_and_a_second_one_leaves_at_once(
    codes: list[int], capfd: pytest.CaptureFixture[str]
) -> None:
    with Signals() as signals:
        os.kill(os.getpid(), signal.SIGINT)
        assert (signals.stop, codes) == ("SIGINT", [])
        assert "Stopping after this step" in capfd.readouterr().err
        os.kill(os.getpid(), signal.SIGINT)
    assert codes == [130]
    assert "without saving" in capfd.readouterr().err


def test_under_torchrun_the_same_press_may_come_twice_within_a_second(
    codes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """torchrun passes on the Ctrl-C that the terminal has sent."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    with Signals() as signals:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        assert (signals.stop, codes) == ("SIGINT", [])
        signals.stopped_at -= 1.1
        os.kill(os.getpid(), signal.SIGINT)
    assert codes == [130]
