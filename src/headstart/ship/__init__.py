"""What leaves the house: a model folder, and predictions from it. Nothing of training is needed here."""
