"""The forward of a unit, its first call, and `checkpoint`."""
