"""The four experiments."""
