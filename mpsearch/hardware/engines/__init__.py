"""Engines: whose kernels are timed."""
