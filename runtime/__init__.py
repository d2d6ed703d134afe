"""From a bundle and cameras to detections and events; imports no torch."""
