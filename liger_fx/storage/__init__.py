"""Optimised models on the disk: saved and loaded."""
