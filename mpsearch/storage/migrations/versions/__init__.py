"""One file per schema number. A released file never changes."""
