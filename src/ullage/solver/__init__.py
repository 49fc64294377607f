"""The exact solver: units, options, runs and transfers as numbers. It knows no tensors, modules or names of mechanisms."""
