"""Baselines of the training benchmark: how others lay the same samples out and step over them."""
