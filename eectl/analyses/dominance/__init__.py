"""Gradient dominance (paper's Figure 2): each exit's gradient against the sum that moves the shared weights."""
