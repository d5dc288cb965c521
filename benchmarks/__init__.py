"""Benchmarks: figures for RESULTS.md, each by one command."""
