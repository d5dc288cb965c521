"""Families of number formats: names, fit and exact bytes. Their rounding is in `mpsearch.model.codecs`."""
