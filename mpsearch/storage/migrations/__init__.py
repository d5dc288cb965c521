"""Alembic scripts of the results database, run by `mpsearch.storage.migrate`."""
