"""The search of the launch table for a GPU."""
