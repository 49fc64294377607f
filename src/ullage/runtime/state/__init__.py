"""The state that a unit reaches: find it, see what changes, put it back."""
