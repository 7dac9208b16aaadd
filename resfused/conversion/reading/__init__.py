"""What a module is called with, and what its code computes of that."""
