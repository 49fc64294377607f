"""Say which tensors hold a peak, and which changes (levers) would lower it."""
