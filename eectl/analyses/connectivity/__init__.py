"""Mode connectivity (paper's Figure 3): losses on the line between networks, as they are and with units matched."""
