"""A replay in backward: what it may read, which ops it skips, what it hands to autograd."""
