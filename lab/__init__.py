"""Measures the product: benchmarks, comparisons with other software, and the checks that need a GPU."""
