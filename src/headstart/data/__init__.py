"""Pictures: found, checked, split, decoded once, and handed to training as tensors."""
