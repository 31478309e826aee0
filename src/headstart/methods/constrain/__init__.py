"""Stay close to the source: methods that add a term to what is minimised."""
