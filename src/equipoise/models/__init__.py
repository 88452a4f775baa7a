"""Small models that host the layer."""
