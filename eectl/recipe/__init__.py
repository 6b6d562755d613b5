"""A run as data: recipes and how they are read, regimes, loss weights, and every name that a user can choose. No torch."""
