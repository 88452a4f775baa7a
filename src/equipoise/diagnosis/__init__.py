"""What a model's routing does: its trace, and what can be read from it."""
