"""The paper's five questions about a multi-exit network: one module each, over what `asking` holds. No torch at import.

A question takes open checkpoints and its settings and gives an Answer: numbers, a table and a reading. It writes and draws
nothing; `analyze` does the first and `plots` the second.
"""

QUESTIONS = {
    "gradient-dominance": "how much each exit's gradient has its way in the shared weights",
    "mode-connectivity": "whether two networks lie in one basin once their units are matched",
    "numerical-rank": "how many dimensions each block's activations fill",
    "mutual-information": "how much each block's activations say about the input and the label",
    "loss-landscape": "how the losses rise around the weights",
}
