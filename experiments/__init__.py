"""Studies over several runs: each a program that trains, compares, and writes a table and a plot."""
