"""Compressed frames to stored values: one file per codec, each with one fixed library.

A codec's file has ``header_of(frame, layout)``, what the codestream says of itself, and ``decode(frame, layout, header)``.
"""
