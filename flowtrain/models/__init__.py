"""Recipes: from the shape of a sample to a flow."""
