"""The results database. It knows SQL and nothing of torch, Ray or the other leaves; see `store.SqlStore`."""
