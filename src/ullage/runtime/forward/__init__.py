"""A forward under the runtime, and `checkpoint`."""
