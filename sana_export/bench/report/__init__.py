"""Reports of benchmarks: the data, its renderings, and the comparison of two reports."""
