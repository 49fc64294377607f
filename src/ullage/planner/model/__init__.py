"""The solver's model of a study's step, and the choice of a schedule where tensors may be offloaded."""
