"""A web server over a folder, with the manners of cameras: JPEGs without end at /mjpeg, a redirect at /moved."""

import functools
import http.server
import io
import threading
import time

from PIL import Image


class WebServer:
    """Serves until it is closed; may come back on the same port."""

    def __init__(self, folder, frames=(), port=0):
        """frames: of /mjpeg, ten a second, from the first to every client."""
        self.asked = []
        """Every path that was asked for."""
        handler = functools.partial(_Handler, directory=str(folder))
        self._server = _Server(("127.0.0.1", port), handler)
        self._server.owner, self._server.frames, self._server.is_open = self, frames, True
        self.port = self._server.server_port
        self.url = f"http://127.0.0.1:{self.port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()

    def close(self):
        """Let go of the port, and of those who look at JPEGs."""
        self._server.is_open = False
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def handle_error(self, request, address):
        """A client that hangs up is no news."""


class _Handler(http.server.SimpleHTTPRequestHandler):
    def do_GET(self):
        self.server.owner.asked.append(self.path)
        if self.path == "/mjpeg":
            self._jpegs()
        elif self.path == "/moved":
            self.send_response(302)
            self.send_header("Location", "/clip.mp4")
            self.end_headers()
        elif self.path == "/locked":
            self.send_error(401)
        else:
            super().do_GET()

    def _jpegs(self):
        self.send_response(200)
        self.send_header("Content-Type", "multipart/x-mixed-replace; boundary=frame")
        self.end_headers()
        for image in self.server.frames:
            if not self.server.is_open:
                return
            jpeg = io.BytesIO()
            Image.fromarray(image).save(jpeg, "JPEG")
            head = f"--frame\r\nContent-Type: image/jpeg\r\nContent-Length: {jpeg.tell()}\r\n\r\n".encode()
            self.wfile.write(head + jpeg.getvalue() + b"\r\n")
            time.sleep(0.1)

    def log_message(self, *_):
        pass
