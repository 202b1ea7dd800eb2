"""Records of a run -> tables, plots, a page, a comparison."""
