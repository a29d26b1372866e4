"""Studies over finished runs; each writes tables and plots that EXPERIMENTS.md shows."""
