"""Models: names, cached weights, and loading."""
