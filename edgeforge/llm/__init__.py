"""Language models: text out of a bundle."""
