"""Drive any method: one loop, one machine, one way to save and resume."""
