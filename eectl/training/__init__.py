"""Training: from a recipe to a run folder, the one loop, the step; attach-heads and --dry-run beside it."""
