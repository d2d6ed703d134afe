"""psdiff config check, show, schema."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from ..cli import app, reported_errors

config_app = typer.Typer(help="Look at the file of a site.", no_args_is_help=True)
app.add_typer(config_app, name="config")

SiteFile = Annotated[
    Path, typer.Argument(metavar="SITE.yaml", help="The file of the site.", show_default=False)
]


@config_app.command()
@reported_errors()
def check(path: SiteFile) -> None:
    """Say whether a file describes a site, and whether the secrets that it names are there."""
    from ..runtime.site_file import load_site, resolved_url

    site = load_site(path)
    for camera in site.cameras:
        resolved_url(camera)
    enabled = sum(camera.enabled for camera in site.cameras)
    typer.echo(f"{path} is a site with {len(site.cameras)} cameras, {enabled} of them enabled")


@config_app.command()
@reported_errors()
def show(path: SiteFile) -> None:
    """Print the site with every default filled in, and without logins."""
    import yaml

    from ..runtime.site_file import load_site, shown

    typer.echo(yaml.safe_dump(shown(load_site(path)), sort_keys=False), nl=False)


@config_app.command()
def schema() -> None:
    """Print the JSON Schema of the file, for editors."""
    from ..runtime.site_file import Site

    typer.echo(json.dumps(Site.model_json_schema(), indent=2))
