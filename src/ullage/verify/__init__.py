"""Gradients, buffers, parameters and optimizer state: bitwise against the plain step."""

from ullage.verify._verify import Check, Difference, verify

__all__ = ["Check", "Difference", "verify"]
