"""Tests of the planner: options, runs, the solver, what is said of a plan."""
