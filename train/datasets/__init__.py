"""One schema for every dataset."""
