"""SIGTERM and Ctrl-C request a stop after the current step; the second one stops at once."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType

from tidali.console import say


class StopRequest:
    """While entered, the first SIGTERM or SIGINT sets `signal_number`; the second has its usual effect."""

    def __init__(self) -> None:
        self.signal_number = 0
        self._previous: dict[int, object] = {}

    @property
    def requested(self) -> bool:
        return self.signal_number != 0

    def __enter__(self) -> StopRequest:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.signal_number = number
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        say("stopping after this step and saving; again to stop at once")
