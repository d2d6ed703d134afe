"""What systemd wants to know of a service of Type=notify: a few words over a datagram socket (sd_notify(3))."""

from __future__ import annotations

import logging
import os
import socket
import threading
from collections.abc import Callable, Mapping

logger = logging.getLogger(__name__)


class ServiceNotifier:
    """Tells systemd READY, STOPPING and WATCHDOG; does nothing where nobody listens."""

    def __init__(self, is_well: Callable[[], bool], environment: Mapping[str, str] = os.environ) -> None:
        """is_well: asked before each sign of life; a service that is not well gives none, and is restarted."""
        self._address = environment.get("NOTIFY_SOCKET", "")
        if self._address.startswith("@"):
            # An abstract socket.
            self._address = f"\0{self._address[1:]}"
        watchdog_us = environment.get("WATCHDOG_USEC", "")
        is_ours = environment.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
        # Twice in the time that systemd gives, as sd_watchdog_enabled(3) says.
        self._interval_s = int(watchdog_us) / 2e6 if watchdog_us.isdigit() and is_ours else 0.0
        self._is_well = is_well
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._live, name="watchdog", daemon=True)

    def ready(self) -> None:
        """The service is at work."""
        self._tell("READY=1")
        if self._address and self._interval_s > 0:
            self._thread.start()

    def stopping(self) -> None:
        """The service ends. Signs of life go on: the end has its own time limit."""
        self._tell("STOPPING=1")

    def close(self) -> None:
        """Give no more signs of life."""
        self._stopping.set()

    def _live(self) -> None:
        while not self._stopping.wait(self._interval_s):
            if self._is_well():
                self._tell("WATCHDOG=1")

    def _tell(self, words: str) -> None:
        if not self._address:
            return
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as to_systemd:
                to_systemd.connect(self._address)
                to_systemd.sendall(words.encode())
        except OSError as error:
            logger.warning("systemd must hear %s, got %s", words, error, extra={"err_code": "systemd"})
