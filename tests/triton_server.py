"""A real tritonserver on this machine, from the wheel of nvidia-pytriton in .venv-triton."""

import contextlib
import itertools
import os
import signal
import socket
import subprocess
import sysconfig
import time
from pathlib import Path

import psdiff

ROOT = Path(psdiff.__file__).resolve().parent
VENV = ROOT / ".venv-triton"
PREPARE = "run make triton-server"
START_S = 180.0


def missing():
    """What is not there, as a reason to skip; None where a server can be started."""
    if not (VENV / "bin" / "python").exists():
        return f"no tritonserver in {VENV}: {PREPARE}"
    if not list(installation().glob("backends/python/triton_python_backend_stub")):
        return f"no stub of the Python backend for this Python: {PREPARE}"
    return None


def installation():
    [site] = VENV.glob("lib/python*/site-packages")
    return site / "pytriton" / "tritonserver"


def own_ports():
    """Ports below those that the system gives out itself; each process of the tests has a thousand of its own."""
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    first, count = 10_000 + 1_000 * (worker % 20), 1_000
    begin = os.getpid() % count
    return itertools.cycle([first + (begin + i) % count for i in range(count)])


PORTS = own_ports()


def free_ports(count):
    """Ports that are free, and stay so as far as other tests go: none is given out twice in a row."""
    ports = []
    while len(ports) < count:
        port = next(PORTS)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            ports.append(port)
    return ports


class TritonServer:
    """One process; after kill it can be started again on the same ports."""

    def __init__(self, repository, log, options=()):
        self.repository, self.log, self.options = repository, log, options
        self.http, self.grpc, self.metrics = free_ports(3)
        self.url = f"127.0.0.1:{self.grpc}"
        self.process = None

    def start(self, wait=True):
        home = installation()
        libraries = [home.parents[1] / "nvidia_pytriton.libs", sysconfig.get_config_var("LIBDIR")]
        # The embedded interpreter finds its environment by the first python on the path.
        environment = dict(
            os.environ,
            PATH=f"{VENV / 'bin'}:{os.environ['PATH']}",
            LD_LIBRARY_PATH=":".join(map(str, libraries)),
        )
        for name in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV"):
            environment.pop(name, None)
        command = [home / "bin" / "tritonserver", "--model-repository", self.repository]
        command += ["--backend-directory", home / "backends", "--disable-auto-complete-config"]
        command += ["--exit-timeout-secs", "5"]
        for service in ("http", "grpc", "metrics"):
            command += [f"--{service}-address", "127.0.0.1", f"--{service}-port", getattr(self, service)]
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                [str(part) for part in (*command, *self.options)],
                stdout=log,
                stderr=log,
                env=environment,
                start_new_session=True,
            )
        if wait:
            self.wait_until_ready()
        return self

    def wait_until_ready(self):
        import tritonclient.grpc
        from tritonclient.utils import InferenceServerException

        end = time.monotonic() + START_S
        with tritonclient.grpc.InferenceServerClient(self.url) as client:
            while time.monotonic() < end and self.process.poll() is None:
                try:
                    if client.is_server_ready():
                        return
                except InferenceServerException:
                    pass
                time.sleep(0.1)
        self.kill()
        raise AssertionError(f"tritonserver did not get ready:\n{self.log.read_text()[-4000:]}")

    def ended(self, timeout=START_S):
        return self.process.wait(timeout)

    def kill(self):
        """Kill the server and the interpreters of its models, as a machine that loses its power does."""
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
