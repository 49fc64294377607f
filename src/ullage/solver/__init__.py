"""The exact solver: chains of units, options, runs and transfers as numbers; no tensor, no module, no mechanism of a name."""
