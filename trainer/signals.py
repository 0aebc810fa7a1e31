"""What people and the machine ask of a running process: stop, save, leave.

Before: the operating system's signals. After: loop.py, which tells all ranks at the next step.
"""

import contextlib
import ctypes
import os
import signal
import sys
import time
from collections.abc import Iterator
from typing import Any

SAME_PRESS_SECONDS = 1.0  # torchrun passes on the Ctrl-C that the terminal has sent already


class Wishes:
    """SIGINT, SIGTERM, SIGHUP: save after this step and leave. SIGUSR1: save, go on.

    A second SIGINT ends the process at once; checkpoints are whole or absent all the same.
    """

    def __init__(self) -> None:
        self.stop = ""  # the signal's name
        self.save = False
        self.stopped_at = 0.0

    def take(self) -> tuple[bool, bool]:
        """(whether to stop, whether to save); a wish to save is taken once."""
        saves, self.save = self.save, False
        return bool(self.stop), saves

    @contextlib.contextmanager
    def caught(self) -> Iterator[None]:
        def remember(number: int, frame: Any) -> None:
            if number == signal.SIGUSR1:
                self.save = True
                return
            now = time.monotonic()
            if self.stop and number == signal.SIGINT and now - self.stopped_at > SAME_PRESS_SECONDS:
                os.write(sys.stderr.fileno(), b"Leaving at once; --resume goes on.\n")
                os._exit(128 + signal.SIGINT)
            if not self.stop:
                self.stop, self.stopped_at = signal.Signals(number).name, now

        numbers = [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1]
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as it is under nohup
            numbers.append(signal.SIGHUP)
        before = {s: signal.signal(s, remember) for s in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def end_with_launcher() -> None:
    """Have the kernel end this process when torchrun dies: no orphan goes on writing the run."""
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
        launcher = os.getppid()
        pr_set_pdeathsig = 1  # prctl(2)
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
        if os.getppid() != launcher:  # it died before the kernel knew
            os.kill(os.getpid(), signal.SIGKILL)
