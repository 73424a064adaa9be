"""Graphs as Python source that people read and import: ``liger_fx.to_folder``."""
