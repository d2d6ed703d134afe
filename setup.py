"""Map the repository root to the package psdiff; metadata and tool settings stand in pyproject.toml."""

from setuptools import setup

PARTS = [
    "benchmarks",
    "commands",
    "export",
    "kernels",
    "models",
    "runtime",
    "training",
    "training.city",
    "training.datasets",
    "training.evaluation",
    "training.synthetic",
    "training.teacher",
]

setup(
    packages=["psdiff", *(f"psdiff.{part}" for part in PARTS)],
    package_dir={"psdiff": "."},
    include_package_data=False,
    package_data={
        "psdiff": ["py.typed"],
        "psdiff.models": ["presets/*.json"],
        "psdiff.training": ["recipes/*.yaml"],
        "psdiff.runtime": ["bundles/*/*"],
    },
    # Without script_name, a wheel built by pip ships this file as psdiff/setup.py.
    script_name="setup.py",
)
