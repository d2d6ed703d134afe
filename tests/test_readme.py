"""What README.md tells people to type exists: make targets, psdiff commands and their options."""

import re
from pathlib import Path

import psdiff
import pytest
import typer
from psdiff.__main__ import app
from psdiff.bundle import load_manifest
from psdiff.runtime.detector import shipped_bundle

ROOT = Path(psdiff.__file__).parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
SHELLS = {"sh", "bash", "shell", "console"}


def command_lines():
    """Lines of the shell blocks, and what stands in single backticks; without comments and continuations."""
    blocks = "\n".join(block for language, block in FENCE.findall(README) if language in SHELLS)
    lines = blocks.replace("\\\n", " ").splitlines()
    lines += re.findall(r"`([^`\n]+)`", FENCE.sub("", README))
    return [line.split(" #")[0].strip().removeprefix("$ ") for line in lines]


LINES = command_lines()
MAKE_LINES = [line for line in LINES if line.startswith("make ")]
PSDIFF_LINES = [line for line in LINES if re.search(r"^(\S*/)?psdiff [a-z]|-m psdiff [a-z]", line)]
COMMANDS = typer.main.get_command(app).commands


def test_the_two_commands_for_a_fresh_machine_are_there():
    assert {"make demo", "make test"} <= {" ".join(line.split()[:2]) for line in MAKE_LINES}


@pytest.mark.parametrize("line", MAKE_LINES)
def test_make_targets_exist(line):
    targets = [word for word in line.split()[1:] if re.fullmatch(r"[a-z][a-z-]*", word)]
    assert targets, line
    for target in targets:
        assert re.search(rf"^{target}:", MAKEFILE, re.MULTILINE), f"Makefile must have the target {target}"


@pytest.mark.parametrize("line", PSDIFF_LINES)
def test_psdiff_commands_and_their_options_exist(line):
    name, rest = re.search(r"psdiff ([a-z][a-z-]*)(.*)", line).groups()
    assert name in COMMANDS, f"psdiff must have the command {name}"
    command = COMMANDS[name]
    # psdiff teacher train: a command of a command.
    if hasattr(command, "commands"):
        command = command.commands[rest.split()[0]]
    known = {option for parameter in command.params for option in parameter.opts} | {"--help"}
    assert set(re.findall(r"(?<!\S)--[a-z][a-z-]*", rest)) <= known


def test_the_scores_in_the_readme_are_those_of_the_shipped_bundle():
    folder = shipped_bundle()
    if not folder.is_dir():
        pytest.skip(f"the shipped bundle is missing: {folder}")
    measured = load_manifest(folder).measurements
    assert measured
    for row in measured:
        assert f"| {row.steps} | {row.ap50:.3f} | {row.top1:.3f} |" in README
