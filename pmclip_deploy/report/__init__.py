"""Answers as DICOM objects: a Structured Report (``document.py``) and a page as a Secondary Capture (``capture.py``).

Only ``tree.py`` and ``document.py`` import highdicom, inside functions: it comes with the extra ``ward``.
"""
