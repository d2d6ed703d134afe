"""A TCP proxy that misbehaves when told to: between a camera and its reader it is the network."""

from __future__ import annotations

import contextlib
import socket
import threading
import time

from .rtp_faults import PacketFault, RtspSplitter

# At a bounded rate so much goes out at once: a slow link delays packets, it does not clump them by the second.
SLOW_CHUNK = 1024


class TcpProxy:
    """Forwards connections to a port of this machine; refuses, stalls, slows, alters or cuts them on demand.

    RTSP over TCP is understood on its way from the server, so that single packets can be altered; anything else
    passes as it is.
    """

    def __init__(self, target: int) -> None:
        """target: port that connections are forwarded to."""
        self.forwarded_s = 0.0
        """When the latest bytes went to a client, of the monotonic clock."""
        self.accepted = 0
        """Connections so far."""
        self.fault: PacketFault | None = None
        """Applied to every RTP and RTCP packet from the server, from the next one on."""
        self.bytes_per_s: float | None = None
        """The most that passes from the server to one client; None for all there is."""
        self._target = target
        self._flowing = threading.Event()
        self._flowing.set()
        self._mute = False
        self._lock = threading.Lock()
        self._sockets: set[socket.socket] = set()
        self._listener: socket.socket | None = None
        self._forwarded = 0
        self._measured_s = time.monotonic()
        self.port = 0
        self.listen()

    def usual_bytes_per_s(self) -> float:
        """What was forwarded to clients since the last call, or since the start."""
        now_s = time.monotonic()
        rate = self._forwarded / max(0.1, now_s - self._measured_s)
        self._forwarded, self._measured_s = 0, now_s
        return rate

    def listen(self) -> None:
        """Take connections (again), on the same port."""
        self._mute = False
        if self._listener is None:
            self._listener = socket.create_server(("127.0.0.1", self.port))
            self.port = self._listener.getsockname()[1]
            threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def refuse(self) -> None:
        """End every connection and close the port."""
        listener, self._listener = self._listener, None
        if listener is not None:
            # A thread in accept wakes up by shutdown, not by close.
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)
            listener.close()
        self.cut()

    def mute(self) -> None:
        """Take new connections and never say a word; those that are open end."""
        self._mute = True
        self.cut()

    def stall(self) -> None:
        """Nothing passes any more, and nobody is told."""
        self._flowing.clear()

    def flow(self) -> None:
        """End a stall."""
        self._flowing.set()

    def cut(self) -> None:
        """End every connection; new ones are taken."""
        with self._lock:
            open_now = list(self._sockets)
        for each in open_now:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def heal(self) -> None:
        """End every fault."""
        self.fault = None
        self.bytes_per_s = None
        self.flow()
        if self._mute:
            self.listen()
            self.cut()
        self.listen()

    def close(self) -> None:
        """End for good."""
        self._flowing.set()
        self.refuse()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            self.accepted += 1
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        """One connection, to its end in both directions."""
        with client, self._known(client):
            if self._mute:
                with contextlib.suppress(OSError):
                    while client.recv(65536):
                        pass
                return
            try:
                server = socket.create_connection(("127.0.0.1", self._target))
            except OSError:
                return
            with server, self._known(server):
                back = threading.Thread(target=self._answer, args=(server, client), daemon=True)
                back.start()
                self._ask(client, server)
                back.join()

    @contextlib.contextmanager
    def _known(self, each: socket.socket):  # noqa: ANN202 - an Iterator[None]
        with self._lock:
            self._sockets.add(each)
        try:
            yield
        finally:
            with self._lock:
                self._sockets.discard(each)

    def _ask(self, client: socket.socket, server: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := client.recv(65536):
                self._flowing.wait()
                server.sendall(data)
        _hang_up(client, server)

    def _answer(self, server: socket.socket, client: socket.socket) -> None:
        splitter = RtspSplitter()
        with contextlib.suppress(OSError):
            while data := server.recv(65536):
                altered = splitter.feed(data, self.fault)
                self._flowing.wait()
                self._send(client, altered)
        _hang_up(server, client)

    def _send(self, client: socket.socket, data: bytes) -> None:
        rate = self.bytes_per_s
        step = len(data) if rate is None else SLOW_CHUNK
        for start in range(0, len(data), max(1, step)):
            chunk = data[start : start + step]
            if rate is not None:
                time.sleep(len(chunk) / rate)
            client.sendall(chunk)
            self._forwarded += len(chunk)
            self.forwarded_s = time.monotonic()


def _hang_up(*sockets: socket.socket) -> None:
    for each in sockets:
        with contextlib.suppress(OSError):
            each.shutdown(socket.SHUT_RDWR)
