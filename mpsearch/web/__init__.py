"""What is seen in a browser: the report of a study as one file."""
