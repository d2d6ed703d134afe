"""No login is ever shown, wherever it stands."""

import pytest
from psdiff.runtime.redaction import Redactor, without_logins
from psdiff.runtime.site_file import Site


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("got rtsp://admin:pw@10.0.0.1:554/s1?x=1, again", "got rtsp://10.0.0.1:554/s1, again"),
        ("rtsp://admin:p@ss/w:rd@host/s1", "rtsp://host/s1"),
        ("rtsp://host/user=admin&password=pw&channel=1.sdp", "rtsp://host/channel=1.sdp"),
        ("(https://u:p@host/hook?token=abc)", "(https://host/hook)"),
        ("two: rtsp://a:b@one/x and RTSPS://c:d@two/y", "two: rtsp://one/x and RTSPS://two/y"),
        ("http://127.0.0.1:8420/api/v1/cameras", "http://127.0.0.1:8420/api/v1/cameras"),
        ("from rtsp://u:p@host/s1?x=1; next try", "from rtsp://host/s1; next try"),
        ("nothing@all: 5", "nothing@all: 5"),
    ],
)
def test_urls_lose_logins_and_queries(text, shown):
    assert without_logins(text) == shown


def test_passwords_of_a_site_disappear_without_their_url_too(monkeypatch):
    monkeypatch.setenv("GATE_PASS", "p@ss w/rd")
    redact = Redactor()
    redact.learn(
        Site.model_validate(
            {
                "cameras": [
                    {"id": "a", "url": "rtsp://admin:${GATE_PASS}@host/s1"},
                    {"id": "b", "url": "rtsp://host/user=keeper&password=topsecret&channel=1"},
                    {"id": "c", "url": "rtsp://${NOBODY_SET_THIS}@host/s1"},
                    {"id": "d", "url": "rtsp://admin:abc@host/s1"},
                ]
            }
        )
    )
    assert redact("401 for admin with p@ss w/rd") == "401 for admin with ***"
    assert redact("p%40ss%20w%2Frd is wrong") == "*** is wrong"
    assert redact("keeper has topsecret") == "keeper has ***"
    # So short that it would blank other words; in a URL it goes by its place.
    assert redact("abc of rtsp://admin:abc@host/s1") == "abc of rtsp://host/s1"
