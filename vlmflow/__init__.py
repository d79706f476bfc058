"""vlmflow: the POINTS recipe for training vision-language models, as pipelines."""

__version__ = "0.1.0"
