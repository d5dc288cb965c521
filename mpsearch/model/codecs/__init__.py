"""Codecs: the arithmetic of each family of `mpsearch.formats`, on weights seen as rows of output channels."""
