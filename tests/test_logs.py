"""Logs: one JSON object a line, no logins, no floods."""

import io
import json
import logging
import sys
import threading
import warnings

import pytest

pytest.importorskip("structlog", reason="structlog is not installed")
from psdiff.runtime.logs import RateLimit, configure_logs
from psdiff.runtime.redaction import Redactor
from psdiff.runtime.site_file import Site

PASSWORD = "topsecret"
SITE = Site.model_validate({"cameras": [{"id": "gate", "url": f"rtsp://admin:{PASSWORD}@10.0.0.1/s1"}]})


@pytest.fixture
def logged():
    """Configure logs into a text; gives a function that configures, and one that reads lines."""
    root = logging.getLogger()
    kept = root.handlers[:], root.level, sys.excepthook, threading.excepthook
    stream = io.StringIO()
    redact = Redactor()
    redact.learn(SITE)

    def start(log_format="json", level="info"):
        configure_logs(redact, log_format, level, stream)
        return stream

    yield start
    logging.captureWarnings(False)
    root.handlers[:], sys.excepthook, threading.excepthook = kept[0], kept[2], kept[3]
    root.setLevel(kept[1])


def lines(stream):
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_a_record_is_a_line_of_json_with_its_fields(logged):
    stream = logged()
    told = {"camera": "gate", "err_code": "timeout", "frame_seq": 7, "trace_id": "ab", "other": 1}
    logging.getLogger("psdiff.test").warning("%s: %d\ntwo lines", "gate", 5, extra=told)
    logging.getLogger("psdiff.test").debug("not asked for")
    [line] = lines(stream)
    assert line.pop("timestamp").endswith("Z")
    assert line == {
        "event": "gate: 5\ntwo lines",
        "level": "warning",
        "logger": "psdiff.test",
        "camera": "gate",
        "err_code": "timeout",
        "frame_seq": 7,
        "trace_id": "ab",
    }


def log_everywhere():
    """A password in every place that a record has."""
    logger = logging.getLogger("psdiff.test")
    url = f"rtsp://admin:{PASSWORD}@10.0.0.1/s1?token={PASSWORD}"
    logger.warning("cannot open %s", url)
    logger.warning("cannot open %s", {"url": url, "parts": [PASSWORD]})
    logger.warning("fields", extra={"camera": url, "err_code": PASSWORD, "frame_seq": (PASSWORD,)})
    try:
        try:
            raise ValueError(f"the inner one of {url}")
        except ValueError as error:
            raise RuntimeError(f"401 with {PASSWORD}") from error
    except RuntimeError:
        logger.exception("it failed")
    logger.warning("stack", stack_info=True)
    warnings.warn(f"about {url}", UserWarning, stacklevel=1)

    def dies():
        raise OSError(f"uncaught {url}")

    thread = threading.Thread(target=dies)
    thread.start()
    thread.join()
    try:
        raise KeyError(PASSWORD)
    except KeyError:
        sys.excepthook(*sys.exc_info())


@pytest.mark.parametrize("log_format", ["json", "text"])
@pytest.mark.filterwarnings("default")
def test_a_password_never_appears(logged, log_format):
    stream = logged(log_format)
    log_everywhere()
    text = stream.getvalue()
    for said in ("cannot open", "fields", "the inner one", "401 with ***", "uncaught", "about", "KeyError"):
        assert said in text, said
    assert PASSWORD not in text
    assert "rtsp://10.0.0.1/s1" in text


def test_auto_is_json_where_no_terminal_is(logged):
    stream = logged("auto")
    logging.getLogger("psdiff").info("said")
    assert lines(stream)[0]["event"] == "said"


def test_text_is_for_people(logged):
    stream = logged("text")
    logging.getLogger("psdiff").info("said", extra={"camera": "gate"})
    assert "said" in stream.getvalue()
    assert "camera=gate" in stream.getvalue()
    assert "{" not in stream.getvalue()


def record(camera, code):
    made = logging.makeLogRecord({"msg": "x"})
    made.__dict__.update({} if code is None else {"camera": camera, "err_code": code})
    return made


def test_one_camera_and_code_speaks_once_and_then_every_ten_minutes_with_the_count():
    now = [0.0]
    limit = RateLimit(600, lambda: now[0])
    assert limit.filter(record("gate", "timeout"))
    assert not any(limit.filter(record("gate", "timeout")) for _ in range(5))
    assert limit.filter(record("gate", "refused"))
    assert limit.filter(record("hall", "timeout"))
    now[0] = 599.0
    assert not limit.filter(record("gate", "timeout"))
    now[0] = 600.0
    again = record("gate", "timeout")
    assert limit.filter(again)
    assert again.suppressed == 6
    now[0] = 1200.0
    quiet = record("gate", "timeout")
    assert limit.filter(quiet)
    assert not hasattr(quiet, "suppressed")


def test_what_has_no_code_is_never_left_out():
    limit = RateLimit(600, lambda: 0.0)
    assert all(limit.filter(record("gate", None)) for _ in range(3))


def test_a_camera_that_is_away_for_a_day_writes_few_lines(logged):
    stream = logged()
    for _ in range(1000):
        logging.getLogger("psdiff").warning("refused", extra={"camera": "gate", "err_code": "refused"})
    assert len(lines(stream)) == 1
