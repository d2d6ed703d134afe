"""The frame of the command line: the app, its exit codes, and how errors are told.

Exit codes: 0 ok, 1 failed, 2 usage, 3 refused (a bundle that is missing, altered, or of another format).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

import typer

FAILED, USAGE, REFUSED = 1, 2, 3

app = typer.Typer(
    name="psdiff",
    help="Find a person in many cameras: detection and re-identification as one diffusion process.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


class UsageError(Exception):
    """An argument is wrong, or does not fit the others."""


@app.callback()
def _commands() -> None:
    # With a callback a single command keeps its name: psdiff run, not psdiff.
    pass


@contextmanager
def reported_errors() -> Iterator[None]:
    """Turn the errors a user can mend into one line on stderr and an exit code; a bug keeps its traceback."""
    from .bundle import BundleError
    from .runtime.frames import ImageError, SourceError
    from .runtime.query import QueryError
    from .runtime.site_errors import SiteError
    from .runtime.traces import TraceError
    from .runtime.triton_detector import ServerError

    try:
        yield
    except BundleError as error:
        fail(str(error), REFUSED)
    except (UsageError, SourceError, ImageError, QueryError, SiteError, TraceError) as error:
        fail(str(error), USAGE)
    except (OSError, ServerError) as error:
        fail(str(error), FAILED)


@contextmanager
def usage() -> Iterator[None]:
    """Report a ValueError as a mistake in the arguments: for calls that only check them."""
    try:
        yield
    except ValueError as error:
        raise UsageError(str(error)) from None


def fail(message: str, code: int) -> NoReturn:
    """Print one line on stderr and end with the exit code."""
    typer.echo(f"error: {message}", err=True)
    raise typer.Exit(code)
