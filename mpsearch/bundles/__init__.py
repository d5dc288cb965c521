"""Studies in one file that can be sent: see `mpsearch.bundles.sharing`."""
