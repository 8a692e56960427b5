"""Grids of runs: what a file asks for, and a scheduler that brings every cell to its end once."""
