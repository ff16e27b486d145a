"""Compressed frames to stored values: one file per codec, each with one fixed library.

A codec's file has ``header_of(frame, layout)``, what the codestream says of itself, and ``decode(frame, layout, header)``.
Four files are no codecs: ``frame`` chooses a codec, ``layout`` has the types that all share, ``jpeg_header`` reads the headers of JPEG and
JPEG-LS, and ``gdcm`` decodes what ``jpeg`` does not.
"""
