"""eectl: train, calibrate, measure and explain multi-exit neural networks."""

__version__ = "0.1.0"
