"""VQA heads on top of the image tower, one file each."""
