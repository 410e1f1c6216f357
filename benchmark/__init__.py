"""The benchmark: all input and output, all policy."""
