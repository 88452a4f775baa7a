"""The experts: what computes the routed rows."""
