"""The model that comes out: blocks that own graphs, the plans they run, and who makes them."""
