"""The paper's questions about a multi-exit network: a module each, over what `asking` holds. No torch at import.

A question takes open checkpoints and its settings and gives an Answer: numbers, a table and a reading. It writes and draws
nothing; `analyze` does the first and `plots` the second.
"""
