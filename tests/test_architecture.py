"""The rules of CONTRIBUTING.md, read from the source: who imports whom, sizes, names, packaging."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import psdiff
import pytest

ROOT = Path(psdiff.__file__).parent

# Part -> what it may import besides itself. The longest part that fits a module counts.
ALLOWED = {
    "kernels": (),
    "models": ("kernels",),
    "training": ("models", "kernels", "bundle"),
    "training.synthetic": (),
    "training.datasets": (),
    "training.city": ("training.synthetic", "training.datasets"),
    "export": ("models", "kernels", "bundle", "plans", "runtime.triton_contract"),
    "runtime": (
        "models.detections",
        "models.detector",
        "models.preprocess",
        "models.renoising",
        "models.sampling",
        "models.verification",
        "bundle",
        "plans",
        # Device memory, copies and streams, which need no torch: docs/adr/0012.
        "kernels.driver",
        "kernels.launch",
    ),
    "bundle": (),
    "plans": ("bundle",),
    "cli": ("bundle", "runtime"),
}
# These sit on top and may import every part; nothing may import them.
TOP = ("__main__", "commands", "demo", "benchmarks")
LIGHT = {"typer", "rich", "cli", "commands"}
# An edge box installs no torch; these must load without it.
TORCH_FREE = (
    "runtime",
    "kernels.compile",
    "kernels.device_array",
    "kernels.launch",
    "export.engines",
    "export.int8",
    "training.synthetic",
    "training.datasets",
    "training.city",
    "bundle",
    "plans",
    "cli",
    "commands",
    "demo",
    "__main__",
)

LARGEST, LARGE_WITHOUT_REASON = 500, 350
BANNED = {"util", "utils", "misc", "helper", "helpers", "common", "base", "manager", "handler", "processor"}
# Import names that differ from the name of the distribution, and libraries that may come.
LIBRARIES = {"cv2", "PIL", "yaml", "ulid", "tensorrt", "triton", "faiss", "openvino", "timm", "tritonclient"}


def dependencies():
    """Import names of the base and the optional dependencies, where they are those of the distribution."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    names = {re.split(r"[^\w-]", requirement)[0] for group in groups for requirement in group}
    return {name.replace("-", "_") for name in names} - {"psdiff"}


DEPENDENCIES = dependencies()


def source_files(folder):
    """The Python files under a folder, without environments, builds and hidden folders."""
    relative = (path.relative_to(ROOT) for path in folder.rglob("*.py"))
    return sorted(path for path in relative if not re.search(r"(^|/)(\.|build/)", path.as_posix()))


def dotted(path):
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def parse(path):
    return ast.parse((ROOT / path).read_text(encoding="utf-8"), str(path))


TESTS = source_files(ROOT / "tests")
PACKAGE = [path for path in source_files(ROOT) if path not in TESTS and path != Path("setup.py")]
TREES = {path: parse(path) for path in PACKAGE}
# What --help and every command pay for: their modules import the parts inside functions.
COMMAND_LINE = [Path("__main__.py"), Path("cli.py"), *source_files(ROOT / "commands")]
# The root package itself is "".
MODULES = {dotted(path) for path in PACKAGE}
PARTS = {name.partition(".")[0] for name in MODULES} - {""} | {"tests"}


def imports(tree, path):
    """(name, is relative) of each import; a relative one is resolved to a module of ours where it is one."""
    package = path.parent.parts
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, False) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module, False
        elif isinstance(node, ast.ImportFrom):
            base = [*package[: len(package) - node.level + 1], *(node.module or "").split(".")]
            for alias in node.names:
                names = [".".join(filter(None, parts)) for parts in ([*base, alias.name], base)]
                yield next((name for name in names if name in MODULES), names[1]), True


def ours(path):
    return {name for name, is_relative in imports(TREES[path], path) if is_relative}


def is_within(name, part):
    return name == part or name.startswith(f"{part}.")


def part_of(name):
    return max((part for part in [*ALLOWED, *TOP] if is_within(name, part)), key=len, default=None)


@pytest.mark.parametrize("path", PACKAGE, ids=str)
def test_a_module_imports_only_what_its_part_may(path):
    name = dotted(path)
    part = part_of(name)
    assert part is not None or name == "", f"{path} must lie in a part that ALLOWED or TOP lists"
    for imported in ours(path) - {""}:  # the root holds __version__ only
        if part in TOP:
            assert not is_within(imported, "tests"), imported
            continue
        allowed = (part, *ALLOWED.get(part, ()))
        assert any(is_within(imported, other) for other in allowed), f"{part} must not import {imported}"


def test_nothing_imports_the_tests_or_the_benchmarks():
    for path in PACKAGE:
        for imported in ours(path):
            assert not is_within(imported, "tests"), path
            assert not is_within(imported, "benchmarks") or path.parts[0] == "benchmarks", path


@pytest.mark.parametrize("path", PACKAGE, ids=str)
def test_inside_the_package_imports_are_relative(path):
    absolute = {name.partition(".")[0] for name, is_relative in imports(TREES[path], path) if not is_relative}
    assert not absolute & (PARTS | {"psdiff"})


@pytest.mark.parametrize("path", TESTS, ids=str)
def test_tests_import_the_installed_package(path):
    for name, is_relative in imports(parse(path), path):
        assert not is_relative, f"tests are no package, got a relative import of {name}"
        assert name.partition(".")[0] not in PARTS, f"import psdiff.{name}, not {name}"


@pytest.mark.parametrize("path", COMMAND_LINE, ids=str)
def test_the_command_line_imports_parts_inside_functions(path):
    tree = ast.Module([node for node in TREES[path].body if not isinstance(node, ast.FunctionDef)], [])
    for name, is_relative in imports(tree, path):
        known = LIGHT if is_relative else LIGHT | sys.stdlib_module_names
        assert name.partition(".")[0] in known, f"{path} must import {name} inside a function"


def test_running_loads_no_torch(tmp_path):
    modules = [name for name in sorted(MODULES) if any(is_within(name, part) for part in TORCH_FREE)]
    code = f"import sys\nfor name in {modules}: __import__(f'psdiff.{{name}}')\nprint('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert result.stdout.strip() == "False", result.stderr


@pytest.mark.parametrize("path", [*PACKAGE, *TESTS], ids=str)
def test_a_module_is_not_too_long(path):
    num_lines = len((ROOT / path).read_text(encoding="utf-8").splitlines())
    assert num_lines <= LARGEST, f"{path} must have at most {LARGEST} lines, got {num_lines}"
    if path in TREES and num_lines > LARGE_WITHOUT_REASON:
        reason = ast.get_docstring(TREES[path]) or ""
        assert "lines" in reason, f"{path} has {num_lines} lines; its docstring must give the reason"


@pytest.mark.parametrize("path", [path for path in PACKAGE if path.stem != "__init__"], ids=str)
def test_names_say_something_and_shadow_nothing(path):
    assert not set(path.stem.split("_")) & BANNED
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.ClassDef):
            words = re.findall(r"[A-Z]+[a-z0-9]*|[a-z0-9]+", node.name)
            assert not {word.lower() for word in words} & BANNED, node.name
    assert path.stem not in sys.stdlib_module_names | DEPENDENCIES | LIBRARIES


@pytest.mark.parametrize("path", [path for path in PACKAGE if path.stem == "__init__"], ids=str)
def test_a_package_file_holds_its_docstring_only(path):
    first, *rest = TREES[path].body
    assert isinstance(first, ast.Expr), f"{path} must begin with a docstring"
    assert isinstance(first.value, ast.Constant), f"{path} must begin with a docstring"
    assigned = [ast.unparse(target) for node in rest for target in getattr(node, "targets", [node])]
    assert assigned == (["__version__"] if path == Path("__init__.py") else [])


def test_setup_ships_every_package():
    assignments = [node for node in parse(Path("setup.py")).body if isinstance(node, ast.Assign)]
    [listed] = [
        ast.literal_eval(node.value) for node in assignments if ast.unparse(node.targets[0]) == "PARTS"
    ]
    packages = [dotted(path) for path in PACKAGE if path.stem == "__init__" and path != Path("__init__.py")]
    assert sorted(listed) == sorted(packages)
