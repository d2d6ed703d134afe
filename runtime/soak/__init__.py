"""Faults on demand against a running service; here since the command, the benchmarks and the tests share them."""
