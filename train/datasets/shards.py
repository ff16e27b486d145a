"""WebDataset shards: tar files of KEY.jpg or KEY.png with KEY.txt, or with KEY.json that has a caption.

One pass over a tar file's headers notes where each picture lies, and reads the captions. Nothing is unpacked: a picture is read at its
place when it is needed, in any order. Shuffling, --resume and torchrun are therefore those of files in a folder.
"""

import io
import re
import tarfile
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

from pmclip_deploy.console import one_line
from pmclip_deploy.errors import InputError
from pmclip_deploy.train.datasets.pictures import Member
from pmclip_deploy.train.datasets.schema import BROKEN_SHARE, SPLITS, Layout, Pair, caption_from_text, is_there, row_from_line

SPLIT_OF = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}  # by a shard's first word, or its folder
# A key ends at the first point of the name, as WebDataset has it: KEY.seg.png is no picture of KEY.
NAME = re.compile(r"((?:.*/)?[^/.]+)\.(jpg|jpeg|png|txt|json)", re.DOTALL | re.IGNORECASE)
LARGEST_PICTURE = 128 << 20  # bytes of the file
LARGEST_TEXT = 1 << 20  # bytes of a caption's file, and of a tar header
PICTURE, FAULT = "picture", "fault"
Sample = dict[str, Member | str]  # PICTURE, "txt" and "json" to what the sample has; FAULT to what is wrong with it


class Headers(io.BufferedReader):
    """A shard for tarfile, which reads a header into memory however long it claims to be."""

    def read(self, size: int | None = -1) -> bytes:
        if size is None or not 0 <= size <= LARGEST_TEXT:
            raise tarfile.ReadError("a header of this length")
        return super().read(size)


def shards_by_split(folder: Path) -> dict[str, list[Path]]:
    """train-000000.tar or train/000000.tar; a shard that names no split trains."""
    found: dict[str, list[Path]] = {}
    for path in sorted(path for home in ("", *SPLIT_OF) for path in (folder / home).glob("[!.]*.tar") if is_there(path)):
        word = path.parent.name if path.parent != folder else re.split(r"[^a-z]", path.name, maxsplit=1)[0]
        found.setdefault(SPLIT_OF.get(word, "train"), []).append(path)
    return found


def pairs_from_shards(shards: list[Path], skipped: Counter[str]) -> list[Pair]:
    """The pairs in the shards' order. Raises InputError if more than BROKEN_SHARE of the samples, or of the shards, are broken."""
    pairs: list[Pair] = []
    broken: dict[str, list[str]] = defaultdict(list)  # what is wrong, and where
    damaged: list[str] = []
    for shard in shards:
        samples, damage = samples_of_shard(shard)
        damaged += [damage] if damage else []
        for key, sample in samples.items():
            picture, caption = sample.get(PICTURE), sample.get("txt", sample.get("json"))
            if FAULT not in sample and isinstance(picture, Member) and isinstance(caption, str) and caption:
                pairs.append(Pair(picture, caption))
            else:
                fault = sample.get(FAULT) or ("no caption in its txt or json" if picture else "no picture (jpg, jpeg, png)")
                broken[str(fault)].append(f"{shard}: {one_line(key)}")
    count = sum(map(len, broken.values()))
    if len(damaged) > BROKEN_SHARE * len(shards):
        raise InputError(f"{damaged[0]} ({len(damaged)} of {len(shards)} shards)", "copy it again, and decompress it if it is compressed")
    if count > BROKEN_SHARE * (count + len(pairs)):
        fault, where = next(iter(broken.items()))
        said = f"{count} of {count + len(pairs)} samples, more than {BROKEN_SHARE:.0%}"
        raise InputError(f"{where[0]}: {fault} ({said})", "make the shards again")
    for fault, where in broken.items():
        skipped[f"{fault}; the first: {where[0]}"] += len(where)
    for damage in damaged:
        skipped[f"{damage}; what follows is lost"] += 1
    return pairs


def samples_of_shard(shard: Path) -> tuple[dict[str, Sample], str]:
    """(key to sample, what is wrong with the shard or ""). Raises InputError if the shard cannot be read."""
    samples: dict[str, Sample] = {}
    key = ""
    try:
        with Headers(io.FileIO(shard)) as file:
            for entry in members(file, shard.stat().st_size):
                if named := NAME.fullmatch(entry.name):
                    key, kind = named[1], named[2].lower()
                    fill(samples.setdefault(key, {}), kind if kind in ("txt", "json") else PICTURE, entry, shard, file)
    except OSError as error:
        raise InputError(f"{shard}: cannot be read ({error.strerror})", "give the dataset's folder") from None
    except (tarfile.TarError, ArithmeticError, LookupError, RecursionError, ValueError):  # what tarfile meets in a damaged header
        return samples, f"{shard}: cut short or damaged" + (f" after {one_line(key)}" if key else "")
    return samples, ""


def members(file: Headers, size: int) -> Iterator[tarfile.TarInfo]:
    """What a tar file of ``size`` bytes holds; between two members ``file`` may be read. Raises what tarfile does."""
    at = 0
    with tarfile.open(fileobj=file, mode="r:", encoding="utf-8", errors="backslashreplace") as tar:
        while (entry := tar.next()) is not None:
            outside = entry.isreg() and not entry.issparse() and not 0 <= entry.size <= size - entry.offset_data
            if outside or not at <= entry.offset < tar.offset:  # else a negative size leads back, without an end
                raise tarfile.ReadError("a size that cannot be")
            at = tar.offset
            tar.members.clear()  # type: ignore[attr-defined] # it keeps them all
            yield entry
    file.seek(at)
    if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):  # tarfile takes a damaged header for the end
        raise tarfile.ReadError("no end")


def fill(sample: Sample, kind: str, entry: tarfile.TarInfo, shard: Path, file: Headers) -> None:
    """Puts a picture's place, or a caption, into its sample, or what is wrong with it."""
    limit = LARGEST_PICTURE if kind == PICTURE else LARGEST_TEXT
    if not entry.isreg() or entry.issparse():
        sample[FAULT] = "a link, device or sparse file"
    elif entry.size > limit:
        sample[FAULT] = f"a file of more than {limit >> 20} MiB"
    elif kind in sample:
        sample[FAULT] = f"two files of {kind} with one key"
    elif kind == PICTURE:
        sample[kind] = Member(shard, entry.name, entry.offset_data, entry.size)
    else:
        file.seek(entry.offset_data)
        try:
            text = file.read(entry.size).decode("utf-8-sig")
            sample[kind] = caption_from_text(text if kind == "txt" else row_from_line(text, ("caption",))["caption"])
        except UnicodeDecodeError:
            sample[FAULT] = "a caption that is not UTF-8"
        except ValueError:
            sample[kind] = ""


def layout(skipped: Counter[str]) -> Layout[Pair]:
    return Layout(
        "WebDataset shards",
        "train-000000.tar or train/000000.tar of KEY.jpg and KEY.txt",
        lambda folder: tuple(split for split in SPLITS if split in shards_by_split(folder)),
        lambda folder, split: pairs_from_shards(shards_by_split(folder)[split], skipped),
    )
