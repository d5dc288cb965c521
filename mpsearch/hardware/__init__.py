"""Targets: what each format costs."""
