"""Deployment: a trained network that answers for new inputs, within a budget."""
