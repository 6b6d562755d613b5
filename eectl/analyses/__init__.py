"""The paper's questions about a multi-exit network, each with its plot. No torch at import.

A question (a module or a folder) takes open checkpoints and its `settings` and returns an Answer: numbers, tables and a reading.
`analyze` opens the checkpoints and writes and draws the answer; `tables` prints it.
"""
