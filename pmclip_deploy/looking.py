"""What a bundle's graphs make of a picture: the image tower, what the head sees, the graph "findings", and probes over the tower."""

from collections.abc import Mapping, Set
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from pmclip_deploy.bundle.contract import contract_of
from pmclip_deploy.bundle.files import rows_from_bundle
from pmclip_deploy.bundle.manifest import Manifest
from pmclip_deploy.bundle.names import PROBES
from pmclip_deploy.bundle.types import Head
from pmclip_deploy.decision.evidence import FindingScores
from pmclip_deploy.decision.heads import Floats, sigmoid
from pmclip_deploy.errors import BundleError, InputError, UsageError
from pmclip_deploy.header.read import Header
from pmclip_deploy.sessions import Session

if TYPE_CHECKING:
    from pmclip_deploy.imaging.picture import Picture


class PictureGraphs:
    """The graphs of one bundle that see pictures. Safe for threads."""

    def __init__(self, path: Path | None, manifest: Manifest, sessions: Mapping[str, Session]) -> None:
        self.path = path
        self.manifest = manifest
        self.probed: frozenset[str | None] = frozenset(probe.finding.name for probe in manifest.probes)  # findings it was taught
        self._contract = contract_of(manifest)
        self._sessions = sessions

    def embedding_from_tensor(self, tensor: Floats) -> Floats:
        """(3, S, S) -> (D,)."""
        embedding: Floats = self._sessions["image"].run({"pixels": tensor[None]})["embedding"][0]
        return embedding

    def inputs_of_head(self, picture: "Picture", head: Head) -> dict[str, dict[str, Floats]]:
        """The inputs, batch 1, of each graph that the head sees an image through; with its mirror image where the head has details."""
        from pmclip_deploy.imaging.preprocess import grey_from_pixels, tensor_from_pixels

        inputs = dict[str, dict[str, Floats]]()
        if head.clip:
            pixels = tensor_from_pixels(picture.pixels, self.manifest.preprocess)[None]  # (1, 3, S, S)
            inputs["image"] = {"pixels": np.concatenate([pixels, pixels[..., ::-1]]) if head.details else pixels}
        if head.grey:
            inputs["features"] = {name: grey_from_pixels(picture.pixels, side)[None] for name, side in head.grey.items()}  # (1, 1, s, s)
        return inputs

    def seen_from_inputs(self, inputs: Mapping[str, Mapping[str, Floats]]) -> Floats:
        parts = []
        for name, of in inputs.items():
            first, *details = (self._sessions[name].run(of)[output] for output in self._contract[name][1])
            if details:  # (2, D), (2, E)
                lengths = np.linalg.norm(first, axis=1, keepdims=True)
                parts += [(first / np.maximum(lengths, 1e-12)).mean(0), details[0].mean(0)]
            else:
                parts.append(first.ravel())
        return np.concatenate(parts) if parts else np.ones(1, np.float32)

    def of_findings(self, picture: "Picture", seen: Floats, header: Header, asked: Set[str | None]) -> FindingScores | None:
        """What is seen of the findings ``asked``; None where there are none to be seen.

        Of a picture that by its header is of no family that any finding was measured on nothing is answered: the graph stays closed.
        """
        if not asked:
            return None
        measured = {s.family for finding in (self.manifest.findings.findings if self.manifest.findings else ()) for s in finding.strata}
        closed = measured and header.family not in (None, *measured)
        looked = FindingScores({}, {}) if closed else self.detect_findings(picture)
        if not asked & self.probed:
            return looked
        looked = looked or FindingScores({}, {})
        return replace(looked, logits={**looked.logits, **self._probed(picture, seen)})

    def _probed(self, picture: "Picture", seen: Floats) -> dict[str, float]:
        """The logits of all probes; ``seen`` begins with the picture's embedding where the head looks through the image tower."""
        head, own = self.manifest.head, seen[: self.manifest.embed_dim]
        if head is not None and head.details:
            embedding = own.astype(np.float64)
        else:
            embedding = self.probe_embedding(picture, own if head is not None and head.clip else None)
        names = [probe.finding.name for probe in self.manifest.probes]
        logits = self._weights[:, :-1].astype(np.float64) @ embedding + self._weights[:, -1]
        return dict(zip(names, logits.tolist(), strict=True))

    def probe_embedding(self, picture: "Picture", image_embedding: Floats | None = None) -> NDArray[np.float64]:
        """(D,): the mean of the unit embeddings of a picture and of its mirror image, in which the logits of probes are linear.

        ``image_embedding`` is the picture's own embedding where it is known. Raises InputError where one of the two has no direction.
        """
        from pmclip_deploy.imaging.preprocess import tensor_from_pixels

        tensor = tensor_from_pixels(picture.pixels, self.manifest.preprocess)
        both = [self.embedding_from_tensor(tensor) if image_embedding is None else image_embedding]
        both.append(self.embedding_from_tensor(np.ascontiguousarray(tensor[..., ::-1])))
        lengths = [float(np.linalg.norm(x.astype(np.float64))) for x in both]
        if not all(0 < length < np.inf for length in lengths):
            raise InputError(f"{picture.info.source}: its embedding has no direction", "give another picture")
        return np.asarray(sum(x.astype(np.float64) / length for x, length in zip(both, lengths, strict=True)) / 2)

    def detect_findings(self, picture: "Picture") -> FindingScores | None:
        """The graph "findings", over the picture and its mirror image."""
        from pmclip_deploy.imaging.preprocess import tensor_from_pixels

        findings = self.manifest.findings
        if findings is None:
            return None
        tensor = tensor_from_pixels(picture.pixels, findings.preprocess)[None]  # (1, 3, S, S)
        runs = [self._sessions["findings"].run({"pixels": np.ascontiguousarray(x)}) for x in (tensor, tensor[..., ::-1])]
        logits, regions = (np.mean([run[name][0] for run in runs], axis=0) for name in ("finding", "region"))
        places = (runs[0]["places"][0] + runs[1]["places"][0][..., ::-1]) / 2  # (F, h, w)
        if len(logits) != len(findings.findings) or len(regions) != len(findings.regions):
            raise BundleError(
                f"the graph findings of bundle {self.manifest.name} does not fit its manifest",
                "export it again with `pmclip-deploy export`",
            )
        if not np.isfinite([*logits, *regions]).all():
            raise BundleError(
                f"bundle {self.manifest.name} computes NaN or infinity for this image", "export it again in a higher precision"
            )
        names = [finding.name for finding in findings.findings]
        shares = dict(zip(findings.regions, sigmoid(regions).tolist(), strict=True))
        return FindingScores(dict(zip(names, logits.tolist(), strict=True)), shares, dict(zip(names, places, strict=True)))

    def view(self, picture: "Picture", finding: str | None) -> NDArray[np.uint8]:
        """``Predictor.model_view`` of a picture that was read."""
        from pmclip_deploy.imaging.overlay import colored
        from pmclip_deploy.imaging.preprocess import resized

        findings = self.manifest.findings
        if finding is None:
            return resized(picture.pixels, self.manifest.preprocess)
        known = {one.name: one for one in (findings.findings if findings else ())}
        if finding in self.probed:
            return resized(picture.pixels, self.manifest.preprocess)
        if findings is None or finding not in known:
            raise UsageError(f"bundle {self.manifest.name} has no finding {finding[:60]!r}", f"it has {', '.join(known) or 'none'}")
        pixels, seen = resized(picture.pixels, findings.preprocess), self.detect_findings(picture)
        if seen is None or known[finding].map_hits is None:
            return pixels
        return colored(pixels, seen.places[finding])

    @cached_property
    def _weights(self) -> Floats:
        """(P, D + 1): of each probe the weights of ``probe_embedding``, and what is added."""
        return rows_from_bundle(self.path, self.manifest, PROBES, len(self.manifest.probes), self.manifest.embed_dim + 1)
