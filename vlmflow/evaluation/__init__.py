"""Benchmarks, answer matching and scores."""
