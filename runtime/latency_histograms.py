"""Latency by stage, batch sizes and steps as Prometheus histograms."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Histogram

from .stage_times import FrameRecord, StageName

# From the post-processing of a GPU to a promise of ten seconds that was missed.
LATENCIES_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
BATCHES = (1, 2, 4, 8, 16, 32)
STEPS = (1, 2, 3, 4, 6, 8)


class LatencyHistograms:
    """Counts what frames took. Stages are labels, cameras are not: sixteen of them would make 2,000 series."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._latency = Histogram(
            "psdiff_frame_latency_seconds",
            "What a frame spent in a stage; e2e is from its capture to its events",
            ["stage"],
            buckets=LATENCIES_S,
            registry=registry,
        )
        self._by_stage: dict[StageName, Histogram] = {}
        """Looking a label up costs as much as counting."""
        self._batch = Histogram(
            "psdiff_batch_size", "Frames that were computed together", buckets=BATCHES, registry=registry
        )
        self._steps = Histogram(
            "psdiff_ddim_steps", "Denoising steps that a frame got", buckets=STEPS, registry=registry
        )

    def __call__(self, record: FrameRecord) -> None:
        """Count one frame."""
        for stage in record.stages:
            self._observe(stage.name, stage.seconds)
        if record.e2e_s is not None:
            # A camera's clock may be ahead of ours.
            self._observe("e2e", max(0.0, record.e2e_s))
        self._steps.observe(record.steps)
        if record.is_first:
            self._batch.observe(record.batch)

    def _observe(self, stage: StageName, seconds: float) -> None:
        if stage not in self._by_stage:
            self._by_stage[stage] = self._latency.labels(stage)
        self._by_stage[stage].observe(seconds)
