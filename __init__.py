"""psdiff finds a person in many cameras: person search as diffusion, trained, exported and run on live video."""

__version__ = "0.1.0"
