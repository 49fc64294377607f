"""A replay in backward: the state it reads, the ops it skips, the tensors it hands to autograd."""
