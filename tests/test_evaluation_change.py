"""The change in AP50 and top-1 that another arithmetic may cost."""

import json
import math
from types import SimpleNamespace

from psdiff.__main__ import app
from psdiff.bundle import load_manifest
from psdiff.training.evaluation import clips
from psdiff.training.evaluation.change import Change
from typer.testing import CliRunner


def change(**scores):
    return Change(4, "a set", 10, 5, **({"ap50": (90, 90), "top1": (80, 80), "bound": 0.5} | scores))


def test_a_change_beyond_the_bound_is_a_fault_and_one_of_it_is_not():
    assert change(ap50=(90, 89.5), top1=(80, 80.5)).faults == []
    [fault] = change(ap50=(90, 89.4)).faults
    assert fault == "AP50 must stay within 0.5 points of 90.00 at K = 4, got 89.40 on a set"
    assert len(change(ap50=(90, 91), top1=(80, math.nan)).faults) == 2


def test_a_set_that_is_too_small_to_tell_says_so():
    [fault] = change(top1=(80, 100)).faults
    assert fault.endswith("got 100.00 on a set, where one query of 5 is 20.00 points")


def test_verify_measures_the_change_on_labelled_clips(small_bundle, tmp_path, monkeypatch):
    seen = []

    def evaluate(detector, images, steps, on_frame):
        seen.append((detector.engine, steps))
        return SimpleNamespace(ap50=0.9 - 0.01 * (len(seen) == 2), top1=0.8, queries=5)

    monkeypatch.setattr(clips, "render_evaluation_set", lambda settings, folder, on_frame: [])
    monkeypatch.setattr(clips, "evaluate", evaluate)
    result = CliRunner().invoke(
        app, ["verify", str(small_bundle), "--labelled", str(tmp_path), "--streets", "1", "--json"]
    )
    assert result.exit_code == 3
    assert "AP50 must stay within 0.2 points of 90.00 at K = 4, got 89.00 on 1 held-out" in result.stderr
    assert json.loads(result.stdout)["change"]["ap50"] == [90, 89]
    assert [steps for _, steps in seen] == [load_manifest(small_bundle).default_steps] * 2
    assert seen[0][0] is not seen[1][0]
