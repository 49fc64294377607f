"""Decide a plan for a study and a budget, and execute its step before it is returned."""
