"""How good a model is, by the published protocols."""
