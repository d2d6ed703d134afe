"""Logs of processes that a service starts: as its own, which it tells them by the environment."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .logs import LogFormat

VARIABLE = "PSDIFF_INHERITED_LOGS"


def tell_children(log_format: LogFormat, level: str) -> None:
    """Let processes that start from now on log like this; arguments as in configure_logs."""
    os.environ[VARIABLE] = f"{log_format} {level}"


def configure_inherited_logs(redact: Callable[[str], str]) -> bool:
    """Log as the service does; False where it said nothing, as in programs that have logs of their own."""
    log_format, _, level = os.environ.get(VARIABLE, "").partition(" ")
    if log_format not in ("auto", "json", "text"):
        return False
    # Who told has it installed.
    from .logs import configure_logs

    configure_logs(redact, log_format, level)
    return True
