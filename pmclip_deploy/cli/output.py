"""What commands share: one-line messages on stderr, one JSON document on stdout, a progress bar on a terminal."""

import json
from typing import Any


def print_json(document: Any) -> None:
    print(json.dumps(document, indent=1, allow_nan=False))
