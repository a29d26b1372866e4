"""Studies over finished runs: each writes the tables and plots that docs/experiments shows."""
