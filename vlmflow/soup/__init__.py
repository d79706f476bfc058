"""Model soups: averages of weights that share a start."""
