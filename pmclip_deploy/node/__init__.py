"""A DICOM node: takes images from modalities and archives, asks a protocol's questions about each study, and sends one report back.

``settings.py`` and ``protocol.py`` read the configuration. ``ledger.py`` holds the state of every image, job and delivery in SQLite.
``receive.py`` is the storage SCP, ``work.py`` makes reports, ``send.py`` delivers them, and ``run.py`` runs the three together.
"""
