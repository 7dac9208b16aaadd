"""What is measured and counted: nodes, networks, their problems, and the gate that they must pass first."""
