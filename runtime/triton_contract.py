"""Names that the writer of a Triton model repository, the model in the server and the client share."""

from __future__ import annotations

MODEL = "psdiff"

# Folder of the bundle within a version of the model.
BUNDLE = "bundle"

# In the order of runtime.serving, which says what they are.
INPUTS = ("image", "frame_size", "boxes_t", "emb_t", "given_boxes", "query")
OUTPUTS = ("num", "boxes_xyxy", "scores", "embeddings", "similarity")

# Parameters of the model's configuration.
BACKEND = "psdiff.backend"
THREADS = "psdiff.threads"
MANIFEST_SHA256 = "psdiff.manifest_sha256"

# Priorities of requests: somebody who searches goes before the streams.
INTERACTIVE, STREAM = 1, 2
