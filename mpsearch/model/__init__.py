"""Models: loading weights, finding layers, rounding to a format."""
