"""Gradients, buffers, parameters and optimizer state: bitwise against the plain step."""

from ullage.verify._verify import Difference, Verification, verify

__all__ = ["Difference", "Verification", "verify"]
