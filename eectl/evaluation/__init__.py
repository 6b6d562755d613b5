"""Measuring a checkpoint: calibrate-thresholds, evaluate, bench; and what their results look like."""
