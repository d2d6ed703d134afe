"""The synthetic street: procedural people with identity, cameras, labelled frames and clips; no torch."""
