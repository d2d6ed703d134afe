"""The events of a service: a file a day, whole lines only."""

import json
from datetime import UTC, datetime

import pytest
from psdiff.runtime import event_log
from psdiff.runtime.event_log import EventLog


class Line:
    def __init__(self, number):
        self.number = number

    def line(self):
        return json.dumps({"number": self.number}) + "\n"


def numbers(path):
    return [json.loads(line)["number"] for line in path.read_text().splitlines()]


def test_events_are_appended_over_restarts(tmp_path):
    for start in (0, 2):
        log = EventLog(tmp_path)
        log.write([Line(start), Line(start + 1)])
        log.write([])
        log.close()
        log.close()
    assert log.path.name == f"events-{datetime.now(UTC):%Y-%m-%d}.jsonl"
    assert numbers(log.path) == [0, 1, 2, 3]


@pytest.mark.parametrize("rest", ["", "{", "x" * 200_000])
@pytest.mark.parametrize("whole", [0, 3])
def test_what_a_crash_left_of_a_line_is_taken_away(tmp_path, whole, rest):
    log = EventLog(tmp_path)
    log.write([Line(i) for i in range(whole)])
    log.close()
    with log.path.open("a") as file:
        file.write(rest)
    log = EventLog(tmp_path)
    log.write([Line(whole)])
    log.close()
    assert numbers(log.path) == list(range(whole + 1))


def test_a_new_day_is_a_new_file(tmp_path, monkeypatch):
    days = iter(["2026-11-20", "2026-11-20", "2026-11-21"])
    monkeypatch.setattr(event_log, "_today", lambda: next(days))
    log = EventLog(tmp_path / "new")
    log.write([Line(0)])
    log.write([Line(1)])
    log.close()
    assert [numbers(path) for path in sorted((tmp_path / "new").iterdir())] == [[0], [1]]


def test_a_full_disk_takes_no_half_line(tmp_path, monkeypatch):
    log = EventLog(tmp_path)
    log.write([Line(0)])
    write = event_log.os.write
    monkeypatch.setattr(event_log.os, "write", lambda file, data: write(file, data[:5]))
    with pytest.raises(OSError, match="events must fit on the disk, got 5 of 14 bytes"):
        log.write([Line(1)])
    monkeypatch.undo()
    log.write([Line(2)])
    assert numbers(log.path) == [0, 2]
    log.close()


def test_a_file_that_is_deleted_or_moved_away_is_begun_anew(tmp_path):
    log = EventLog(tmp_path / "data")
    log.write([Line(0)])
    log.path.unlink()
    log.write([Line(1)])
    assert numbers(log.path) == [1]
    # As logrotate does.
    log.path.rename(tmp_path / "old")
    log.write([Line(2)])
    (tmp_path / "data").rename(tmp_path / "older")
    log.write([Line(3)])
    assert numbers(log.path) == [3]
    assert log.fault() is None
    log.close()


def test_a_folder_that_cannot_be_written_is_a_fault_until_it_can(tmp_path):
    folder = tmp_path / "data"
    log = EventLog(folder)
    assert log.fault() is None
    folder.rename(tmp_path / "elsewhere")
    folder.write_text("a file in the place of the folder")
    assert "cannot be written" in log.fault()
    with pytest.raises(OSError, match="data"):
        log.write([Line(0)])
    folder.unlink()
    log.write([Line(1)])
    assert log.fault() is None
    assert numbers(log.path) == [1]
    log.close()


def test_a_volume_that_is_nearly_full_is_a_fault(tmp_path, monkeypatch):
    log = EventLog(tmp_path)
    monkeypatch.setattr(event_log, "LEAST_FREE_BYTES", 1 << 62)
    assert "lies on a full volume" in log.fault()
    log.close()
