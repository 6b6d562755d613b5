"""Gradient dominance (paper's Figure 2): each exit's gradient against the sum that moves the shared weights.

`dominance` measures finished networks, `tracked` reads what training measured on the way, `plot` draws both.
"""
