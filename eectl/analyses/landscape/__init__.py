"""Loss landscape (paper's Figure 6): the losses of all exits on a plane of filter-normalised directions.

`landscape` asks the question; `plane` moves the weights, `surfaces` does the arithmetic and the tables, `plot` draws.
"""
