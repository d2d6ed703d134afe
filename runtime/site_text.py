"""Changes one camera in the text of a site's file: comments, order and place-holders of everything else stay.

ruamel.yaml does the round trip; pyyaml, which reads the file, would write it anew without its comments.
"""

from __future__ import annotations

import io
import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from .site_errors import SiteError

# Longer lines would be broken anew; nobody asked for that.
WIDTH = 1 << 16


def with_camera(text: str, camera: str, content: Mapping[str, Any]) -> str:
    """The text with one camera changed, or added at the end.

    content: all of its keys but id; url may be left out where the camera is known: it stays as it is written.
    Raises SiteError where the text cannot be edited.
    """
    yaml, document = _loaded(text)
    cameras = document.setdefault("cameras", [])
    if cameras is None:
        cameras = document["cameras"] = []
    known = next((each for each in cameras if each.get("id") == camera), None)
    if known is None:
        cameras.append({"id": camera, **content})
    else:
        for name in [name for name in known if name not in content and name not in ("id", "url")]:
            del known[name]
        known.update(content)
    return _dumped(yaml, document)


def without_camera(text: str, camera: str) -> str:
    """The text without one camera. Raises SiteError where the text cannot be edited."""
    yaml, document = _loaded(text)
    cameras = document["cameras"]
    places = [i for i, each in enumerate(cameras) if each.get("id") == camera]
    for place in places:
        del cameras[place]
    return _dumped(yaml, document)


def write_atomically(path: Path, text: str) -> None:
    """Replace a file so that who reads it, or a crash, finds the old text or the new one. Raises OSError.

    A link stays one: what it points to is replaced.
    """
    path = path.resolve()
    mode = path.stat().st_mode
    with tempfile.NamedTemporaryFile(
        "w", dir=path.parent, prefix=f".{path.name}.", delete=False, encoding="utf-8"
    ) as file:
        try:
            os.fchmod(file.fileno(), mode & 0o7777)
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
            Path(file.name).replace(path)
        except BaseException:
            Path(file.name).unlink(missing_ok=True)
            raise
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _loaded(text: str) -> tuple[YAML, Any]:
    yaml = YAML()
    yaml.preserve_quotes = True
    yaml.width = WIDTH
    # As the cameras are indented now; otherwise every line of them would change.
    indented = re.search(r"^cameras:[^\n]*\n(?:\s*(?:#[^\n]*)?\n)*( *)- ", text, re.MULTILINE)
    offset = len(indented[1]) if indented else 2
    yaml.indent(mapping=2, sequence=offset + 2, offset=offset)
    try:
        document = yaml.load(text)
    except YAMLError as error:
        problem = getattr(error, "problem", None) or type(error).__name__
        raise SiteError(f"site must be YAML that can be edited, got {problem}; edit the file") from None
    return yaml, document if document is not None else {}


def _dumped(yaml: YAML, document: object) -> str:
    stream = io.StringIO()
    yaml.dump(document, stream)
    return stream.getvalue()
