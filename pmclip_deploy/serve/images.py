"""Files that a page works with: in memory only, a few, and for a while."""

import secrets
import time
from collections import OrderedDict
from dataclasses import dataclass, field

from pmclip_deploy.serve.problems import Problem

MOST = 32
MOST_BYTES = 1 << 30
EXPIRES_S = 900.0


@dataclass
class Stored:
    data: bytes = field(repr=False)
    used: float = 0.0


class Images:
    """By id. The oldest leave when there are too many; one that was not used for ``EXPIRES_S`` leaves too."""

    def __init__(self, most: int = MOST, most_bytes: int = MOST_BYTES, expires_s: float = EXPIRES_S) -> None:
        self.most, self.most_bytes, self.expires_s = most, most_bytes, expires_s
        self._kept = OrderedDict[str, Stored]()

    def add(self, data: bytes) -> str:
        self.sweep()
        name = secrets.token_urlsafe(16)
        self._kept[name] = Stored(data, time.monotonic())
        while len(self._kept) > 1 and (len(self._kept) > self.most or self.size > self.most_bytes):
            self._kept.popitem(last=False)
        return name

    def get(self, name: str) -> bytes:
        """Raises a Problem, 404, if it is not there."""
        self.sweep()
        if name not in self._kept:
            raise Problem(404, "image.gone", "no such image; it may have left the memory: send it again")
        self._kept.move_to_end(name)
        self._kept[name].used = time.monotonic()
        return self._kept[name].data

    def remove(self, name: str) -> None:
        self._kept.pop(name, None)

    def clear(self) -> None:
        self._kept.clear()

    def sweep(self) -> None:
        oldest = time.monotonic() - self.expires_s
        for name in [name for name, stored in self._kept.items() if stored.used < oldest]:
            del self._kept[name]

    @property
    def size(self) -> int:
        return sum(len(stored.data) for stored in self._kept.values())

    def __len__(self) -> int:
        return len(self._kept)
