"""Loss landscape (paper's Figure 6): the losses of all exits on a plane of filter-normalised directions."""
