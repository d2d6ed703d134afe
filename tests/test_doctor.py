"""psdiff doctor: what it says of this machine, and what it says of a broken one."""

import json
import subprocess
import sys

import pytest
from psdiff.__main__ import app
from psdiff.commands.doctor import examine
from psdiff.runtime.decoders import probe_decoders
from typer.testing import CliRunner


def state_of(findings):
    return {finding["part"]: finding for finding in findings}


def test_the_report_names_what_runs_the_kernels():
    done = CliRunner().invoke(app, ["doctor", "--json"])
    assert done.exit_code == 0, done.output
    parts = state_of(json.loads(done.stdout))
    assert parts["shipped model"]["detail"].startswith("psdiff_mobile")
    assert "CPUExecutionProvider" in parts["onnxruntime"]["detail"]
    pytest.importorskip("torch", reason="torch is not installed")
    assert "embedding bags" in parts["kernels on the CPU"]["detail"]
    built = parts["kernels on CUDA"]
    assert (built["state"], "PSDIFF_CUDA=1" in built["detail"]) in {("ok", False), ("absent", True)}


def test_the_table_lists_every_part():
    done = CliRunner().invoke(app, ["doctor"])
    assert done.exit_code == 0
    assert all(finding.part.split()[0] in done.stdout for finding in examine())


def test_decoders_are_told_best_first_with_the_reason():
    parts = state_of(json.loads(CliRunner().invoke(app, ["doctor", "--json"]).stdout))
    decoders = [name for name in parts if name.startswith("decoder ")]
    assert decoders == [f"decoder {found.name}" for found in probe_decoders()]
    assert parts["decoder pyav-cpu"]["state"] == "ok"
    assert all(parts[name]["detail"] for name in decoders)
    assert list(parts).index("video decoding") == list(parts).index(decoders[0]) - 1


def test_without_pyav_the_report_still_comes():
    script = (
        "import sys; sys.modules['av'] = None\n"
        "from psdiff.commands.doctor import examine\n"
        "print([(f.part, f.state) for f in examine() if 'deco' in f.part])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout.strip() == "[('video decoding', 'absent')]"


def test_without_pytorch_the_report_still_comes():
    script = (
        "import sys; sys.modules['torch'] = None\n"
        "from psdiff.commands.doctor import examine\n"
        "print([(f.part, f.state) for f in examine() if 'kernels' in f.part or f.part == 'PyTorch'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout.count("absent") == 3


def test_something_installed_that_does_not_work_is_broken(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", object())
    done = CliRunner().invoke(app, ["doctor", "--json"])
    assert done.exit_code == 1
    broken = state_of(json.loads(done.stdout))["onnxruntime"]
    assert broken["state"] == "broken"
    assert broken["detail"].startswith("AttributeError")
