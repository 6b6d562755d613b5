"""What all rooms use: errors, files, seeds, processes, time, the console and figures. Knows no recipe and no network."""
