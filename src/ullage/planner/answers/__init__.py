"""Questions beside a plan: the frontier, the largest size that fits, the tensors that hold the peak."""
