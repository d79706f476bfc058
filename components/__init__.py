"""KFP components: typed ports, image and resources; the work is in vlmflow."""
