"""Logs of a service: JSON lines for machines, text for people; no logins, no floods.

Modules log with the standard library: logger.warning("...", extra={"camera": ..., "err_code": ...}). What they say
about one camera with one code is written once, and then every ten minutes with the number of times.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, Literal, TextIO

import structlog
from structlog.typing import EventDict, WrappedLogger

LogFormat = Literal["auto", "json", "text"]

# Of the records that modules give to extra; the rest of a record is the standard library's own.
FIELDS = ("camera", "err_code", "frame_seq", "trace_id", "suppressed")

# A camera that is away for a month says so this often.
REPEAT_S = 600.0


class RateLimit(logging.Filter):
    """Lets the first record of a camera and code pass, then one every repeat_s; it tells how many were left out."""

    def __init__(self, repeat_s: float = REPEAT_S, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._repeat_s = repeat_s
        self._clock = clock
        self._latest: dict[tuple[str, str], float] = {}
        self._suppressed: dict[tuple[str, str], int] = {}
        self._lock = threading.Lock()

    def filter(self, record: logging.LogRecord) -> bool:
        """As logging.Filter.filter. Records without err_code all pass."""
        code = getattr(record, "err_code", None)
        if code is None:
            return True
        key, now_s = (str(getattr(record, "camera", "")), str(code)), self._clock()
        with self._lock:
            if key in self._latest and now_s - self._latest[key] < self._repeat_s:
                self._suppressed[key] = self._suppressed.get(key, 0) + 1
                return False
            self._latest[key] = now_s
            if suppressed := self._suppressed.pop(key, 0):
                record.suppressed = suppressed
        return True


class _Redaction:
    """A processor that redacts every text of an event, nested ones and tracebacks included."""

    def __init__(self, redact: Callable[[str], str]) -> None:
        self._redact = redact

    def __call__(self, logger: WrappedLogger, name: str, event: EventDict) -> EventDict:
        return {key: self._shown(value) for key, value in event.items()}

    def _shown(self, value: Any) -> Any:  # noqa: ANN401 - whatever a record holds
        if isinstance(value, dict):
            return {str(key): self._shown(each) for key, each in value.items()}
        if isinstance(value, (list, tuple)):
            return [self._shown(each) for each in value]
        if value is None or isinstance(value, (bool, int, float)):
            return value
        return self._redact(str(value))


def configure_logs(
    redact: Callable[[str], str],
    log_format: LogFormat = "auto",
    level: str = "info",
    stream: TextIO | None = None,
) -> None:
    """Send everything that is logged, warned and raised past everybody to a stream, by default stderr.

    redact: what becomes of each text. log_format: auto is text on a terminal, else json. level: debug to critical.
    """
    target: TextIO = sys.stderr if stream is None else stream
    is_terminal = target.isatty()
    is_text = log_format == "text" or (log_format == "auto" and is_terminal)
    handler = logging.StreamHandler(target)
    handler.addFilter(RateLimit())
    handler.setFormatter(_formatter(redact, is_text, is_terminal))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    logging.captureWarnings(True)
    sys.excepthook = _log_uncaught
    threading.excepthook = _log_uncaught_in_thread


def _formatter(
    redact: Callable[[str], str], is_text: bool, is_coloured: bool
) -> structlog.stdlib.ProcessorFormatter:
    render = (
        structlog.dev.ConsoleRenderer(colors=is_coloured)
        if is_text
        else structlog.processors.JSONRenderer(ensure_ascii=False)
    )
    return structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=[
            structlog.stdlib.add_log_level,
            structlog.stdlib.add_logger_name,
            structlog.stdlib.ExtraAdder(FIELDS),
            structlog.processors.TimeStamper(fmt="iso", utc=True),
        ],
        processors=[
            structlog.stdlib.ProcessorFormatter.remove_processors_meta,
            structlog.processors.format_exc_info,
            # The last before the text is made: nothing that comes in later would be redacted.
            _Redaction(redact),
            render,
        ],
    )


def _log_uncaught(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    logging.getLogger(__name__).critical("uncaught", exc_info=(kind, error, traceback))


def _log_uncaught_in_thread(arguments: threading.ExceptHookArgs) -> None:
    if arguments.exc_value is not None and not issubclass(arguments.exc_type, SystemExit):
        _log_uncaught(arguments.exc_type, arguments.exc_value, arguments.exc_traceback)
