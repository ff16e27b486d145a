"""Folders of images to an index, and the nearest of an index."""
