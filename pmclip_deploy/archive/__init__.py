"""A whole archive of images to Parquet files: what a model sees or answers of each, an error being a row like any other."""

EMBED, ASK, FINDINGS = COMMANDS = ("embed", "ask", "findings")
ABOUT = "_archive.json"  # in an archive's folder; a name that readers of Parquet folders pass over
