"""What is known of one workload: the plain step, its units, their options, and what executed steps showed."""
