"""The reference training loop: text, tokens, batches, steps, comparison."""
