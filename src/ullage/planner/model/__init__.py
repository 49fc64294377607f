"""From a study to what the solver sees of it."""
