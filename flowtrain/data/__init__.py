"""Data sets: toys with known densities, images, tables of the user's own."""
