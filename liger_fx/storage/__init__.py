"""Optimised models on the disk: saved, loaded, written as Python source, exported."""
