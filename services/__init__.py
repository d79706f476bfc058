"""What keeps running beside the pipelines, or prepares a cluster for them. Imports vlmflow, never components or pipelines'
task bodies."""
