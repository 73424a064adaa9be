"""The Hugging Face fx tracer: a model becomes one flat graph, with what was assumed written beside
it."""
