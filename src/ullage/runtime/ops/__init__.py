"""The ops of a call: rules that say which outputs to keep, the log, and the ops that a replay skips."""
