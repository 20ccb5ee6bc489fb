"""Checks of a data set and its split; ``command`` lists and runs them."""
