"""What methods are made of. Nothing here knows a method."""
