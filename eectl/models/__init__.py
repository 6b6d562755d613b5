"""Networks: backbones seen as blocks, exit heads, losses, checkpoints, and one adapter for each library. No torch at import."""
