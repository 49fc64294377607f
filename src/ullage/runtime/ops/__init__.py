"""The ops of a call: what is kept of them, which are logged, which a replay need not run."""
