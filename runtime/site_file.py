"""A site: the cameras, the model and the promises of psdiff serve, as one strict YAML file."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self
from urllib.parse import quote

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from .backends import BACKENDS, DEFAULT_SERVER, TRITON
from .capture_time import Trust
from .decoders import DecoderChoice
from .elastic_steps import StepRange
from .frame_queues import QueueMode, QueuePolicy
from .frames import SourceError
from .playback import Pace, Playback
from .site_errors import SiteError, closest, site_error
from .source_address import parse_address

# In a camera's URL: ${NAME} is an environment variable, ${file:/run/secrets/gate} the text of a file.
SECRET = re.compile(r"\$\{(?:file:(?P<file>[^}]+)|(?P<name>\w+))\}")
LOCAL = ("127.0.0.1", "localhost")
NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Place(_Strict):
    """What the site is called, and where its files lie."""

    id: str = Field(default="local", pattern=NAME)
    data_dir: Path = Path("psdiff-data")


class Model(_Strict):
    """What finds people."""

    bundle: Path | None = None
    """Folder; null is the one that comes with psdiff."""
    backend: str = "onnxruntime"
    server: str = DEFAULT_SERVER
    """With backend triton: HOST:PORT of its gRPC service."""
    threads: int | None = Field(default=None, ge=1)
    max_batch: int = Field(default=8, ge=1)

    @field_validator("backend")
    @classmethod
    def _known(cls, value: str) -> str:
        known = [*BACKENDS, TRITON]
        if value not in known:
            raise ValueError(f"must be one of {', '.join(known)}{closest(value, known)}")
        return value


class Steps(_Strict):
    """How many denoising steps are allowed."""

    min: int = Field(default=1, ge=1)
    max: int = Field(default=4, ge=1)

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.min > self.max:
            raise ValueError(f"min must be <= max, got {self.min} and {self.max}")
        return self

    def range(self) -> StepRange:
        """As the chooser takes it."""
        return StepRange(self.min, self.max)


class Promise(_Strict):
    """What is promised for every frame: the service level objective."""

    latency_ms: float = Field(default=500, gt=0)
    """From capture to people; from arrival where the camera does not tell its clock. Frames that cannot keep it are
    dropped, and counted."""
    steps: Steps = Steps()
    min_fps: float = Field(default=1.0, ge=0)
    """Every camera is served this often, whatever the others do; steps are given up for it."""


class CameraDefaults(_Strict):
    """What holds for every camera that does not say otherwise."""

    queue: QueueMode = "bounded"
    depth: int = Field(default=8, ge=1)
    max_staleness_ms: float = Field(default=500, gt=0)
    sample_fps: float | None = Field(default=None, gt=0)
    """Frames a second that are looked at; null for all."""
    transport: Literal["tcp", "udp"] = "tcp"
    """Of RTSP."""
    decoder: DecoderChoice = "auto"
    """Of live cameras; auto is the first that psdiff doctor calls ok. Where it fails the CPU decodes."""
    pace: Pace = "real_time"
    """Of files and folders. flat_out: as fast as frames are computed, none dropped, whatever queue says."""
    loop: bool = False
    """Whether files and folders start again at their end."""
    image_fps: float = Field(default=5, gt=0)
    """Of a folder of images."""
    trust_clock: Trust = "auto"
    """Whether the camera's own clock is believed; auto: within two seconds of ours."""
    warm_start: bool = False
    """Begin each frame with the people of the one before: docs/warm_start.md says what that gains, and loses."""


class Camera(_Strict):
    """One camera; what it leaves out is taken from defaults."""

    id: str = Field(pattern=NAME)
    url: str = Field(min_length=1)
    """rtsp(s)://, http(s)://, v4l2:///dev/video0, or a file or a folder of images; a relative path begins at the
    file of the site. Secrets as ${NAME} or ${file:PATH}."""
    enabled: bool = True
    queue: QueueMode | None = None
    depth: int | None = Field(default=None, ge=1)
    max_staleness_ms: float | None = Field(default=None, gt=0)
    sample_fps: float | None = Field(default=None, gt=0)
    transport: Literal["tcp", "udp"] | None = None
    decoder: DecoderChoice | None = None
    pace: Pace | None = None
    loop: bool | None = None
    image_fps: float | None = Field(default=None, gt=0)
    trust_clock: Trust | None = None
    warm_start: bool | None = None

    @field_validator("url")
    @classmethod
    def _allowed(cls, value: str) -> str:
        try:
            # A place-holder may stand for a port.
            parse_address(SECRET.sub("1", value))
        except SourceError as error:
            raise ValueError(str(error).removeprefix("source ")) from None
        return value


class IngestSettings(_Strict):
    """Where cameras are decoded."""

    isolation: Literal["process", "thread"] = "process"
    """process: a decoder that crashes takes a few cameras with it, for seconds. thread: nothing is copied, and a
    crash ends the service."""
    workers: int | None = Field(default=None, ge=1)
    """Processes; null for one per four cameras, at most one per core."""


class Api(_Strict):
    """Health, metrics and cameras over HTTP."""

    listen: str = Field(default="127.0.0.1:8420", pattern=r"^[^:\s]+:\d+$")
    """This machine alone, as long as nobody is asked who they are: put a proxy with a login before it."""
    hosts: tuple[str, ...] = ()
    """Names by which browsers reach that proxy, where it hands them on (Host); requests for others are refused."""

    @field_validator("listen")
    @classmethod
    def _local(cls, value: str) -> str:
        host = value.rpartition(":")[0]
        if host not in LOCAL:
            raise ValueError(
                f"must be an address of this machine ({', '.join(LOCAL)}), which a proxy may forward to"
            )
        return value


class Trace(_Strict):
    """OpenTelemetry; where traces go is said by OTEL_* in the environment."""

    sample_every: int | None = Field(default=None, ge=1)
    """One frame in so many of each camera; null for none."""


class Site(_Strict):
    """A whole site."""

    version: Literal[1] = 1
    site: Place = Place()
    model: Model = Model()
    promise: Promise = Promise()
    defaults: CameraDefaults = CameraDefaults()
    cameras: tuple[Camera, ...] = ()
    ingest: IngestSettings = IngestSettings()
    api: Api = Api()
    trace: Trace = Trace()

    @model_validator(mode="after")
    def _different_cameras(self) -> Self:
        ids = [camera.id for camera in self.cameras]
        twice = sorted({name for name in ids if ids.count(name) > 1})
        if twice:
            raise ValueError(f"cameras must have different ids, got {', '.join(twice)} more than once")
        return self

    @model_validator(mode="after")
    def _local_warm_starts(self) -> Self:
        warm = [camera.id for camera in self.cameras if self.settings(camera).warm_start]
        if self.model.backend == TRITON and (warm or self.defaults.warm_start):
            whose = ", ".join(warm) or "defaults"
            # The server walks the model's own grid, from T on.
            raise ValueError(f"warm_start must be false with backend {TRITON}, got true for {whose}")
        return self

    def settings(self, camera: Camera) -> CameraDefaults:
        """What holds for a camera."""
        own = {
            name: value
            for name in CameraDefaults.model_fields
            if (value := getattr(camera, name)) is not None
        }
        return self.defaults.model_copy(update=own)

    def playback(self, camera: Camera) -> Playback:
        """How a camera is played."""
        settings = self.settings(camera)
        return Playback(
            pace=settings.pace,
            loop=settings.loop,
            image_fps=settings.image_fps,
            decoder=settings.decoder,
            transport=settings.transport,
        )

    def queue_policy(self, camera: Camera) -> QueuePolicy:
        """How the frames of a camera wait."""
        settings = self.settings(camera)
        is_flat_out = settings.pace == "flat_out" and _is_path(camera)
        return QueuePolicy(
            mode="every_frame" if is_flat_out else settings.queue,
            depth=settings.depth,
            max_staleness_s=settings.max_staleness_ms / 1000,
            min_fps=self.promise.min_fps,
        )


def load_site(path: Path) -> Site:
    """Read a site. Raises SiteError that names the file, the key, what is wanted, and the nearest known key."""
    return parse_site(read_site(path), path)


def read_site(path: Path) -> str:
    """The text of a site's file. Raises SiteError."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SiteError(f"site must be a YAML file, got {path}: {error}") from None


def parse_site(text: str, path: Path) -> Site:
    """The site that a text describes. path: what errors call it. Raises SiteError as load_site does."""
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        # A mark shows a line of the text, which may hold a login.
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        problem = getattr(error, "problem", None) or "no YAML"
        raise SiteError(f"{path} must be YAML, got {where}{problem}") from None
    if not isinstance(content, dict):
        raise SiteError(f"{path} must hold keys and values, got {type(content).__name__}")
    for where, value in _texts(content):
        if SECRET.search(value) and not re.fullmatch(r"cameras\[\d+\]\.url", where):
            reason = "secrets must stand in the url of a camera, got one here"
            raise SiteError(f"{path}: {where}: {reason}", place=where, reason=reason)
    try:
        site = Site.model_validate(content)
    except ValidationError as error:
        raise site_error(error, Site, f"{path}: ") from None
    return site.model_copy(update={"cameras": tuple(beside(camera, path) for camera in site.cameras)})


def parse_camera(content: Mapping[str, Any]) -> Camera:
    """One camera. Raises SiteError, its place within the camera."""
    try:
        return Camera.model_validate(content)
    except ValidationError as error:
        raise site_error(error, Camera) from None


def resolved_url(camera: Camera, environment: Mapping[str, str] = os.environ) -> str:
    """The URL with its secrets, percent-encoded. Raises SiteError where a secret is not there; it shows none."""

    def secret(match: re.Match[str]) -> str:
        if match["name"]:
            if match["name"] not in environment:
                raise SiteError(
                    f"environment must hold {match['name']} for camera {camera.id}, got no such variable",
                    place="url",
                )
            return quote(environment[match["name"]], safe="")
        try:
            return quote(Path(match["file"]).read_text(encoding="utf-8").strip(), safe="")
        except (OSError, UnicodeDecodeError) as error:
            message = f"secret of camera {camera.id} must be a text file, got {error}"
            raise SiteError(message, place="url") from None

    url = SECRET.sub(secret, camera.url)
    try:
        parse_address(url)
    except SourceError as error:
        reason = str(error).removeprefix("source ")
        raise SiteError(f"url of camera {camera.id} {reason}", place="url", reason=reason) from None
    return url


def shown(site: Site) -> dict[str, Any]:
    """The site with every default, for people: without what a URL holds of logins."""
    content = site.model_dump(mode="json")
    for camera in content["cameras"]:
        try:
            # A place-holder is no secret, but a URL with one cannot be parsed.
            camera["url"] = parse_address(SECRET.sub("1", camera["url"])).shown
        except SourceError:
            camera["url"] = f"{camera['url'].partition('://')[0]}://..."
    return content


def _is_path(camera: Camera) -> bool:
    return parse_address(SECRET.sub("1", camera.url)).kind == "path"


def beside(camera: Camera, file: Path) -> Camera:
    """The camera; a relative path begins at the folder of the site's file."""
    if "://" in camera.url:
        return camera
    return camera.model_copy(update={"url": str(file.absolute().parent / camera.url)})


def _texts(content: object, where: str = ""):  # noqa: ANN202 - a generator of (place, text)
    if isinstance(content, dict):
        for name, value in content.items():
            yield from _texts(value, f"{where}.{name}" if where else str(name))
    elif isinstance(content, list):
        for i, value in enumerate(content):
            yield from _texts(value, f"{where}[{i}]")
    elif isinstance(content, str):
        yield where, content
