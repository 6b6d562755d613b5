"""When a row leaves, what leaving costs, and how it really happens. Runs no training and prints nothing."""
