"""The result file, and the environment that it names."""
