"""Many runs as one table: `eectl report`, the paper's numbers beside ours, and curves with bands."""
