"""Studies whose drivers, workers, servers and clusters are killed while they run, and what is left of them."""
