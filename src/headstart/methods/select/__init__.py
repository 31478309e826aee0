"""Choose what to transfer, and where to."""
