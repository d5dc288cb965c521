"""Conformance suites: what every estimator, target, solver, evaluator, exporter and executor must keep."""
