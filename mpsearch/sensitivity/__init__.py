"""Estimators: what each format would hurt, per decision, with error bars."""
