"""POINTS (arXiv 2409.04828): configuration, model and processor, in files that also work as exported remote code."""
