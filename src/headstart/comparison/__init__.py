"""The referee: the same pictures, splits and epochs for every method, and what the difference is worth."""
