"""The training loop of train.py and of science: data, checkpoints, processes."""
