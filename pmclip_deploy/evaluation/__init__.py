"""Answers counted against a dataset's."""
