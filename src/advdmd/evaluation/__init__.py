"""Benchmarks: sampling a suite, judging images from disk, tables and comparisons."""
