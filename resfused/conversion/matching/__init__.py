"""Where a torch.fx graph computes what is fused."""
