"""What every room stands on: errors, files, seeds, processes, time, the console. Knows no recipe and no network."""
