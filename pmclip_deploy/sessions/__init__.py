"""Backends that run a graph."""
