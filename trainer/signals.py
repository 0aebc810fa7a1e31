"""What people and the machine ask of a running process: stop, save."""

import ctypes
import os
import signal
import sys
import time
from typing import Any

SAME_PRESS_SECONDS = 1.0  # under torchrun
STDERR = 2
STOPPING = b"\nStopping after this step, with a checkpoint. Ctrl-C again leaves without one.\n"


class Signals:
    """SIGINT, SIGTERM, SIGHUP: save after the current step and leave. SIGUSR1: save.

    A second SIGINT ends the process at once; checkpoints are whole or absent all the same. Under
    torchrun, which passes on what the terminal has sent already, one press comes twice.
    """

    def __init__(self) -> None:
        self.stop = ""  # the signal's name
        self.stopped_at = 0.0
        self.save = False
        self.same_press = SAME_PRESS_SECONDS if "TORCHELASTIC_RUN_ID" in os.environ else 0.0
        self.before: dict[signal.Signals, Any] = {}

    def take_save(self) -> bool:
        """Whether a checkpoint was asked for since the last call."""
        asked, self.save = self.save, False
        return asked

    def __enter__(self) -> "Signals":
        numbers = [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1]
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as it is under nohup
            numbers.append(signal.SIGHUP)
        self.before = {number: signal.signal(number, self._note) for number in numbers}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: Any) -> None:
        now = time.monotonic()
        if number == signal.SIGUSR1:
            self.save = True
        elif not self.stop:
            self.stop, self.stopped_at = signal.Signals(number).name, now
            if number == signal.SIGINT and os.environ.get("RANK", "0") == "0":
                os.write(STDERR, STOPPING)
        elif number == signal.SIGINT and now - self.stopped_at > self.same_press:
            os.write(STDERR, b"Leaving now, without saving.\n")
            os._exit(128 + signal.SIGINT)


def end_with_launcher() -> None:
    """Have the kernel end this process when torchrun dies: no orphan keeps writing the run."""
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
        launcher = os.getppid()
        pr_set_pdeathsig = 1  # prctl(2)
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
        if os.getppid() != launcher:  # it died before the kernel knew
            os.kill(os.getpid(), signal.SIGKILL)
