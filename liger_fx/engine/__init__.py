"""The engine: reads a traced graph as terms, matches rules, and rewrites what they find."""
