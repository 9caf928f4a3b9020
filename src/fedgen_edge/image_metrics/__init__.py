"""How far apart are two sets of images? Pure functions of their features."""
