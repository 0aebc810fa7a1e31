"""What a press of Ctrl-C does."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT

PRESSED_TWICE = """
import os, signal
from trainer.signals import Signals
with Signals() as asked:
    os.kill(os.getpid(), signal.SIGINT)
    assert asked.stop == "SIGINT"
    os.kill(os.getpid(), signal.SIGINT)
"""


@pytest.mark.parametrize(("launcher", "code"), [({}, 130), ({"TORCHELASTIC_RUN_ID": "x"}, 0)])
def test_ctrl_c_is_acknowledged_and_a_second_one_leaves_at_once(
    launcher: dict[str, str], code: int
) -> None:
    """torchrun passes on the first one: it comes twice, and must not count as the second."""
    command = [sys.executable, "-c", PRESSED_TWICE]
    done = subprocess.run(
        command, env=os.environ | launcher, cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == code
    assert done.stderr.count("Stopping after this step") == 1
    assert ("Leaving now" in done.stderr) == (code == 130)
