"""Methods that choose for each picture which way it goes through the network."""
