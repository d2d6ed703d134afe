"""A TCP proxy that misbehaves when told to: between a camera and its reader it is the network."""

import contextlib
import socket
import threading


class TcpProxy:
    """Forwards connections to a port of this machine; stalls or cuts them on demand."""

    def __init__(self, port):
        self._target = port
        self._flowing = threading.Event()
        self._flowing.set()
        self._sockets = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def stall(self):
        """Nothing passes any more, and nobody is told."""
        self._flowing.clear()

    def flow(self):
        self._flowing.set()

    def cut(self):
        """End every connection; new ones are taken."""
        for each in self._sockets:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
        self._sockets.clear()

    def close(self):
        self._flowing.set()
        self._listener.close()
        self.cut()

    def _accept(self):
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client):
        """One connection, to its end in both directions."""
        with client:
            try:
                server = socket.create_connection(("127.0.0.1", self._target))
            except OSError:
                return
            with server:
                self._sockets += [client, server]
                back = threading.Thread(target=self._pass, args=(server, client), daemon=True)
                back.start()
                self._pass(client, server)
                back.join()

    def _pass(self, source, sink):
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                self._flowing.wait()
                sink.sendall(data)
        for each in (source, sink):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
