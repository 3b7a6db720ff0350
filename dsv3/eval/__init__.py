"""How good a model is, and how evenly its experts work."""
