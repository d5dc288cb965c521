"""What is drawn of a study: the same numbers for the terminal, notebooks, the report and the page."""
