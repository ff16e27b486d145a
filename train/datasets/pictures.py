"""Where a dataset's picture lies: in a file of its own, or among others in a tar file."""

from dataclasses import dataclass
from pathlib import Path

from pmclip_deploy.console import one_line
from pmclip_deploy.errors import InputError
from pmclip_deploy.imaging.picture import Picture
from pmclip_deploy.imaging.read import picture_from_bytes, picture_from_path


@dataclass(frozen=True, order=True, slots=True)
class Member:
    """A file in a tar file without compression. It is read at its place, and never unpacked."""

    shard: Path
    path: str  # in the tar file: a name for messages, no place on this machine
    offset: int  # bytes, of its content
    size: int  # bytes

    @property
    def name(self) -> str:
        return self.path.rpartition("/")[2]

    def __str__(self) -> str:
        return f"{self.shard}: {one_line(self.path)}"

    def read(self) -> bytes:
        """Raises InputError."""
        try:
            with self.shard.open("rb") as file:
                file.seek(self.offset)
                content = file.read(self.size)
        except OSError as error:
            raise InputError(f"{self}: cannot be read ({error.strerror})", "check the tar file") from None
        if len(content) < self.size:
            raise InputError(f"{self}: the tar file has become shorter", "copy it again")
        return content


Place = Path | Member


def picture_of(image: Place) -> Picture:
    """Raises InputError."""
    return picture_from_path(image) if isinstance(image, Path) else picture_from_bytes(str(image), image.read())


def content_of(image: Place) -> bytes:
    return image.read_bytes() if isinstance(image, Path) else image.read()


def size_of(image: Place) -> int:
    """In bytes."""
    return image.stat().st_size if isinstance(image, Path) else image.size
