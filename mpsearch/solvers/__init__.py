"""Solvers: arrays in, choices out. One method per file."""
