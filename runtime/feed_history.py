"""What the earlier feeds of a camera counted: a camera that is followed anew goes on counting where it was."""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import Any

SUMS, GROUPS = ("decoded", "corrupt_packets", "stalled_s"), ("skipped", "reconnects")


class FeedHistory:
    """Counts by camera, from CameraFeed.status; for one thread at a time."""

    def __init__(self) -> None:
        self._counts: dict[str, Counter[str]] = defaultdict(Counter)

    def note(self, status: dict[str, Any]) -> None:
        """Add what a feed counted that comes to its end."""
        camera = status["camera"]
        self._counts[camera] = self._counts[camera] + _flat(status)

    def copy(self) -> FeedHistory:
        """As it is now."""
        other = FeedHistory()
        other._counts.update(self._counts)
        return other

    def added_to(self, status: dict[str, Any]) -> dict[str, Any]:
        """The status of a feed, its counts those of all feeds that the camera had."""
        counts = _flat(status) + self._counts[status["camera"]]
        told: dict[str, Any] = {name: counts[name] for name in SUMS}
        for group in GROUPS:
            told[group] = {
                name.partition(".")[2]: n for name, n in counts.items() if name.startswith(f"{group}.")
            }
        return status | told


def _flat(status: dict[str, Any]) -> Counter[str]:
    """decoded, stalled_s, reconnects.refused and so on; seconds are counts here."""
    counts = Counter({name: status[name] for name in SUMS})
    for group in GROUPS:
        counts.update({f"{group}.{reason}": count for reason, count in status[group].items()})
    return counts
