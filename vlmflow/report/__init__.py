"""One self-contained HTML page about a run: what was done, what came out, what was not run."""
