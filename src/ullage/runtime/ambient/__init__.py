"""The surroundings of a call: this thread's state, flags that change numerics, generators, counters."""
