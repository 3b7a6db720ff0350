"""Benchmarks of what users wait for."""
