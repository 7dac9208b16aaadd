"""What residual blocks are for: four experiments, what they share, and the page that tells them."""
