"""The two operations that PSDiff repeats K times, as plain PyTorch: the specification of every faster version."""
