"""What people ask beside a plan: the frontier, the largest size that fits, what holds the peak."""
