"""Mode connectivity (paper's Figure 3): losses on the line between networks, as they are and with units matched.

`connectivity` asks the question; `permutations` finds units that can change places (by `tracing` one forward pass under the rules
of `aten_rules`), `matching` chooses where they go, `barriers` does the arithmetic, `plot` draws.
"""
