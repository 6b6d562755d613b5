"""Networks: the backbone seen as blocks, exit heads, losses, checkpoints; and one adapter per library. No torch at import."""
