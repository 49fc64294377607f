"""What a tensor is to a replay: its memory, its layout, its bits."""
