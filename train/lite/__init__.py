"""`train vqa --head lite`: trains pmclip-lite's head, and the image tower with it, on questions, and calibrates it.

The steps stand in train.py.
"""
