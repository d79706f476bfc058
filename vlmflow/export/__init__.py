"""A Hugging Face directory that runs without vlmflow."""
