"""The properties of a tensor that a replay compares: its memory, its layout, its bits."""
