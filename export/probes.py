"""What every bundle is probed with, and how a model is asked only once: without torch and onnx, so that `tune` has it too."""

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pmclip_deploy.bundle.contract import contract_of
from pmclip_deploy.errors import PmclipError
from pmclip_deploy.imaging.preprocess import tensor_from_pixels
from pmclip_deploy.imaging.read import picture_from_path
from pmclip_deploy.predictor import Predictor
from pmclip_deploy.sessions import Session

Progress = Callable[[Sequence[Any], str], Iterable[Any]]
Floats = NDArray[np.float32]

# Real CT, MR, US and secondary captures inside pydicom's own wheel.
SAMPLES = (
    "CT_small.dcm",
    "MR_small.dcm",
    "JPEG2000.dcm",
    "693_J2KI.dcm",
    "examples_palette.dcm",
    "examples_ybr_color.dcm",
    "SC_rgb_jpeg_dcmtk.dcm",
)
QUESTIONS = (
    "is there a fracture?",
    "what imaging modality was used?",
    "in which plane was this image taken?",
    "which organ system is shown in the image?",
    "what abnormality is seen in the image?",
    "was the scan taken with contrast?",
    "is this a t1 weighted, t2 weighted, or flair image?",
    "is the study normal?",
    "what is the patient's name?",
)
TEXTS = (  # beside QUESTIONS: in upper case, with accents, negated, long, and what a tokenizer may trip over
    "IS THERE A FRACTURE?",
    "Which Organ System Is Shown In The Image?",
    "CT or MRI?",
    "Is this a T1-weighted MR image, or T2/FLAIR?",
    "PNEUMOTHORAX",
    "is there a pneumothorax, an effusion or a consolidation?",
    "d\u00e9but of a na\u00efve caf\u00e9-au-lait l\u00e9sion?",
    "Ist eine Fraktur des H\u00fcftgelenks zu sehen? STRA\u00dfE",
    "\u00c9PANCHEMENT PLEURAL, FRACTURE DU F\u00c9MUR",
    "there is no fracture",
    "there is not a fracture",
    "without a fracture",
    "with a fracture",
    "ct without contrast",
    "ct with contrast",
    "neither effusion nor pneumothorax, never seen, none, nothing absent",
    "the left lung isn't clear and the right one can't be seen",
    "left",
    "right",
    "yes",
    "no",
    "a",
    "?",
    "T2* gradient, 3.5 mm; 120 kV (50%) & 0.6 \u00b5Sv/h = 1,000 #1 @ [x] {y} <z> ~ ^ _ | \\ $5 'quoted' \"twice\"",
    "electroencephalographically otorhinolaryngological hepatosplenomegaly",
    "   leading,  inner\tand trailing   blanks \n",
    "\u80ba\u708e\u662f\u4ec0\u4e48\uff1f",
    "\u03b1\u03b2\u03b3 \u0440\u0435\u043d\u0442\u0433\u0435\u043d \U0001fa7b",
    "an axial ct image of the upper abdomen after intravenous contrast shows a large mass in the right lobe of the liver",
    "in this frontal chest radiograph of a patient in a supine position, is there any evidence of a pleural effusion on the left side, of "
    "a pneumothorax on the right side, or of consolidation in either of the two lungs?",
    "the heart is not enlarged, the lungs are clear without consolidation, there is no effusion and no pneumothorax, the bones show "
    "neither fractures nor lytic lesions, the soft tissues are normal, the mediastinum is not widened, and nothing else of note is seen "
    "in the abdomen under the diaphragm, where there is no free air at all, nor in the neck above the clavicles, which is all that is "
    "shown here",
)


class KnownSession:
    """A session that computes nothing twice: a checkpoint is compared with every bundle of an export, on the same inputs."""

    def __init__(self, session: Session) -> None:
        self.inputs, self.outputs, self.backend, self.device = session.inputs, session.outputs, session.backend, session.device
        self._session = session
        self._known: dict[bytes, dict[str, NDArray[Any]]] = {}

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        given = [np.ascontiguousarray(inputs[name]) for name in self.inputs]
        key = b"".join(hashlib.sha256(x.data).digest() + repr(x.shape).encode() for x in given)
        if key not in self._known:
            self._known[key] = self._session.run(inputs)
        return self._known[key]


def computing_nothing_twice(predictor: Predictor) -> Predictor:
    """The same model, all of whose graphs are open."""
    sessions = {name: KnownSession(predictor._sessions[name]) for name in contract_of(predictor.manifest)}
    return Predictor(predictor.path, predictor.manifest, sessions, predictor._tokenizers)


def findings_outputs(predictor: Predictor, pixels: NDArray[np.uint8]) -> dict[str, Floats]:
    """What the graph "findings" gives of a picture and of its mirror image: each output (2, ...)."""
    findings = predictor.manifest.findings
    assert findings is not None
    tensor, session = tensor_from_pixels(pixels, findings.preprocess)[None], predictor._sessions["findings"]
    both = [session.run({"pixels": np.ascontiguousarray(x)}) for x in (tensor, tensor[..., ::-1])]  # one at a time, as `infer` does
    return {name: np.concatenate([x[name] for x in both]) for name in session.outputs}


def sample_pictures() -> list[Path]:
    """Of the pictures in pydicom's wheel, those that this machine can read."""
    import pydicom

    folder = Path(pydicom.__file__).parent / "data" / "test_files"
    return [folder / name for name in SAMPLES if (folder / name).is_file() and _readable(folder / name)]


def _readable(path: Path) -> bool:
    try:
        picture_from_path(path)
    except PmclipError:
        return False
    return True
