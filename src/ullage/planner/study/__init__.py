"""The study of one workload: the plain step, its units, their options, and the findings of executed steps."""
