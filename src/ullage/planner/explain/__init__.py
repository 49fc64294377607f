"""What holds a peak, and what would lower it."""
