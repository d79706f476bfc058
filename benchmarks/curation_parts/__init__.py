"""The measurements of `benchmarks/curation.py`, one module each: `add_arguments(parser)` and `run(arguments) -> result`."""
