"""What times something: kernels, nodes, networks."""
