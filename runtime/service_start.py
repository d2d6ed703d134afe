"""From a site to its service: the bundle is checked, proven on this machine, warm, and its costs are known."""

from __future__ import annotations

from ..bundle import load_manifest
from .detector import shipped_bundle
from .service import Service
from .site_file import Site
from .step_costs import cost_table, warm_up
from .traces import FrameTracer
from .verified import open_proven


def open_service(site: Site, tracer: FrameTracer | None = None) -> Service:
    """Open what a site names, and make its service, which is not started.

    Raises what open_proven raises; ValueError where the backend is not installed or the model has no such steps;
    OSError where data_dir cannot be written.
    """
    folder = site.model.bundle or shipped_bundle()
    manifest = load_manifest(folder)
    detector = open_proven(
        manifest, folder, site.model.backend, threads=site.model.threads, server=site.model.server
    )
    warm_up(detector, site.promise.steps.min)
    return Service(site, manifest, detector, cost_table(site, manifest, detector), tracer)
