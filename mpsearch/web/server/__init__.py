"""The HTTP interface of a results database: who may ask what, and the answers."""
