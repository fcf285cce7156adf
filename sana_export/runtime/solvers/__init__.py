"""Solvers as coefficient tables, one file for each family: no torch."""
