"""Curation steps: each reads a manifest and adds a layer."""
