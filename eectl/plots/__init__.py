"""Pictures: `curves` of accuracy against cost, and one module per kind of picture that an analysis draws.

They draw what was computed, choose nothing and need no display; matplotlib is imported where something is drawn.
"""

from eectl.plots.curves import PLOT_FORMATS, check_plot_path, plot_comparison, plot_curve

__all__ = ["PLOT_FORMATS", "check_plot_path", "plot_comparison", "plot_curve"]
