"""What ward.yaml says."""

from __future__ import annotations

import re
from ipaddress import IPv4Network, IPv6Network
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar
from urllib.parse import urlsplit

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator

from pmclip_deploy.console import one_line
from pmclip_deploy.errors import UsageError

UNITS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}  # seconds
FOLDER, DICOM, STOW = "folder", "dicom", "stow"
DICOM_ADDRESS = re.compile(r"(?P<aet>[^@\\]{1,16})@(?P<host>[^@:]+|\[[0-9A-Fa-f:]+\]):(?P<port>\d{1,5})")
SYSLOG_ADDRESS = re.compile(r"([^:\[\]\s]+|\[[0-9A-Fa-f:]+\]):\d{1,5}")

M = TypeVar("M", bound="Strict")


class Strict(BaseModel):
    """A mapping of the file. Every value is a text until its type reads it; an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def seconds(value: Any) -> Any:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd]?)", value) if isinstance(value, str) else None
    if isinstance(value, str) and not found:
        raise ValueError("must be a duration, such as 60, 15m, 6h or 7d")
    return float(found[1]) * UNITS[found[2]] if found else value


Duration = Annotated[float, BeforeValidator(seconds), Field(gt=0)]
AeTitle = Annotated[str, Field(pattern=r"^[!-\[\]-~]([ -\[\]-~]{0,14}[!-\[\]-~])?$")]  # PS3.5 6.2: 16 characters at most, no backslash
Port = Annotated[int, Field(ge=0, le=65535)]
File = Annotated[Path | None, BeforeValidator(lambda value: value or None)]


class Tls(Strict):
    """PEM files. Without ``ca`` a peer needs no certificate; with it, it does unless ``require_client`` is false."""

    cert: Path
    key: Path
    ca: File = None
    require_client: bool = True


class Node(Strict):
    aet: AeTitle = "PMCLIP"
    host: str = "127.0.0.1"
    port: Port = 11112
    tls: Tls | None = None
    max_associations: Annotated[int, Field(ge=1, le=1000)] = 10
    max_pdu: Annotated[int, Field(ge=4096, le=1 << 24)] = 131072  # bytes
    max_instance_mb: Annotated[int, Field(ge=1, le=4096)] = 512


class Peer(Strict):
    """An application entity that may connect, and where from."""

    aet: AeTitle
    addresses: Annotated[list[IPv4Network | IPv6Network], Field(min_length=1)]


class Complete(Strict):
    """When a study is taken as whole: nothing of it came for ``quiet_s``, or its first image is ``force_s`` old."""

    quiet_s: Duration = 60.0
    force_s: Duration = 1800.0


class Destination(Strict):
    """Where reports go."""

    to: str
    calling: AeTitle | None = None  # our AE title there; default the node's
    sr_classes: Annotated[list[Literal["comprehensive3d", "comprehensive", "enhanced"]], Field(min_length=1)] = ["comprehensive3d"]
    sc: Literal["never", "allowed"] = "never"  # a Secondary Capture, if no class of sr_classes is accepted
    commit: bool = False  # ask for storage commitment
    tls: bool = False
    ca: File = None
    token_file: File = None
    i_understand_this_is_research: bool = False

    @field_validator("to")
    @classmethod
    def _known(cls, to: str) -> str:
        kind, _, rest = to.partition(":")
        if kind == FOLDER and rest:
            return to
        if kind == DICOM and DICOM_ADDRESS.fullmatch(rest):
            return to
        if kind == STOW and urlsplit(rest).scheme in ("http", "https") and urlsplit(rest).hostname:
            return to
        raise ValueError("must be folder:PATH, dicom:AET@HOST:PORT or stow:URL")

    @model_validator(mode="after")
    def _research(self) -> Destination:
        if self.kind != FOLDER and not self.i_understand_this_is_research:
            raise ValueError("a report in an archive is read as a finding: set i_understand_this_is_research: true, or send to a folder")
        if self.kind != DICOM and (self.commit or self.sc != "never"):
            raise ValueError("sc and commit are for a dicom: destination alone")
        return self

    @property
    def classes(self) -> list[str]:
        """Names of the classes in which a report may go there, the preferred one first."""
        return [*self.sr_classes, *(["sc"] if self.sc == "allowed" else [])]

    @property
    def kind(self) -> str:
        return self.to.partition(":")[0]

    @property
    def rest(self) -> str:
        return self.to.partition(":")[2]

    @property
    def name(self) -> str:
        """For logs and metrics: without a path or a query."""
        return self.to if self.kind == DICOM else self.kind


class Retry(Strict):
    """Waits ``first_s``, then ``factor`` times as long each time up to ``max_s``; gives up after ``give_up``."""

    first_s: Duration = 10.0
    factor: Annotated[float, Field(ge=1, le=100)] = 2.0
    max_s: Duration = 900.0
    give_up: Duration = 7 * 86400.0

    def wait(self, tries: int) -> float:
        """Seconds after so many failed tries, 1 or more."""
        return float(min(self.first_s * self.factor ** min(tries - 1, 64), self.max_s))


class Disk(Strict):
    refuse_below_gb: Annotated[float, Field(ge=0)] = 5.0
    retention_images: Literal["on_sent"] | Duration = 86400.0  # after the last report of their study has arrived everywhere
    retention_reports: Duration = 7 * 86400.0


class Audit(Strict):
    """Where audit messages go. The file's name gets the day; ``ca`` signs the syslog's certificate."""

    file: File = None
    syslog: str | None = None
    ca: File = None
    hash_patient_id: bool = True

    @field_validator("syslog")
    @classmethod
    def _address(cls, syslog: str) -> str | None:
        if syslog and not SYSLOG_ADDRESS.fullmatch(syslog):
            raise ValueError("must be HOST:PORT, such as audit.example:6514")
        return syslog or None

    @model_validator(mode="after")
    def _somewhere(self) -> Audit:
        if self.file is None and self.syslog is None:
            raise ValueError("give file: PATH, syslog: HOST:PORT, or both; or leave audit out")
        return self


class Metrics(Strict):
    """/metrics, /live and /ready on 127.0.0.1."""

    port: Port


class Ward(Strict):
    """Paths are relative to the folder of the file."""

    state: Path = Path("state")
    bundle: File = None
    node: Node = Node()
    peers: list[Peer] = []  # nobody may connect
    complete: Complete = Complete()
    protocols: Annotated[list[Path], Field(min_length=1)]
    send: Annotated[list[Destination], Field(min_length=1)]
    retry: Retry = Retry()
    disk: Disk = Disk()
    audit: Audit | None = None
    metrics: Metrics | None = None


def ward_from_file(path: Path) -> Ward:
    """Raises UsageError with the first fault."""
    ward = model_from_file(Ward, path)
    folder = path.absolute().parent
    sends = [one.model_copy(update={"to": f"{FOLDER}:{folder / one.rest}"}) if one.kind == FOLDER else one for one in ward.send]
    if repeated := {one.to for one in sends if [other.to for other in sends].count(one.to) > 1}:
        raise UsageError(f"{path}: send: {min(repeated)} stands there twice", "give each destination once")
    return ward.model_copy(
        update={
            "state": folder / ward.state,
            "bundle": ward.bundle and folder / ward.bundle,
            "protocols": [folder / protocol for protocol in ward.protocols],
            "send": sends,
            "audit": ward.audit and ward.audit.model_copy(update={"file": ward.audit.file and folder / ward.audit.file}),
        }
    )


def model_from_file(model: type[M], path: Path) -> M:
    """A YAML file as a model. Raises UsageError with the first fault."""
    import yaml

    try:
        content = yaml.load(path.read_text("utf-8"), Loader=_loader())
        return model.model_validate({} if content is None else content)
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror})", "check the path") from None
    except UnicodeDecodeError:
        raise UsageError(f"{path}: is no UTF-8 text", "give a YAML file") from None
    except (yaml.YAMLError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark is not None else ""
        raise UsageError(f"{path}{where}: {one_line(str(getattr(error, 'problem', None) or 'is no YAML'))}", "correct the file") from None
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise UsageError(f"{path}: {where}: {one_line(first['msg'].removeprefix('Value error, '))}", "correct the file") from None


def _loader() -> Any:
    """Every scalar is a text, so that YES stays YES. A repeated key is an error."""
    import yaml

    class Loader(yaml.BaseLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            keys = set()
            for key, _ in node.value:
                name = self.construct_object(key, deep=True)
                if not isinstance(name, str) or name in keys:
                    raise yaml.constructor.ConstructorError(None, None, "a key stands there twice, or is no text", key.start_mark)
                keys.add(name)
            return super().construct_mapping(node, deep)

    return Loader
