"""Real small data for a laptop run, served over HTTP."""
