"""Foundations of all rooms: errors, files, seeds, processes, time, the console and figures. Knows no recipe and no network."""
