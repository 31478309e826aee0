"""Networks: built by name, filled with weights, and known by their family."""
