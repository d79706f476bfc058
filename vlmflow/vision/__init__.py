"""Pixels to tiles: how an image is cut before an encoder sees it."""
