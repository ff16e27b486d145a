"""The errors a user can meet. Each class has the process's exit code and a code for programs.

    PmclipError       "error"             1  a bug of ours if it is none of the following
    ├── UsageError    "usage"             2  the command line or an argument is wrong
    ├── InputError    "input"             3  the image or question file cannot be read
    │   └── NoPictureError  "input.no_picture"  the file may be whole, and holds no picture
    ├── BundleError   "bundle"            4  a bundle or checkpoint is missing, broken or tampered with
    ├── ParityError   "parity"            5  a parity gate failed
    ├── GateError     "gate"              5  a finding did not pass the gate of its validation
    ├── DeviceError   "device"            6  the device or backend asked for is not there
    └── TrainingError "training"          1  training cannot go on: the loss is no number, or memory is full

A message is one line: what and where. The hint is what to do next. It names parameters as Python does, device="cpu"; the command line
makes options of them. Neither ever holds a patient attribute.
"""


class PmclipError(Exception):
    """Any error that a user can meet; caught alone, it catches all that follow.

    ``code`` names the class for programs, and stays the same from release to release. ``message`` says what is wrong and where, ``hint``
    what to do next ("" where the message says all). ``str(error)`` is both in one line. An error can be pickled.

    >>> import pmclip_deploy as pm
    >>> try:
    ...     pm.load("no-such-folder")
    ... except pm.PmclipError as error:
    ...     print({"code": error.code, "message": error.message})
    ...     print(error)
    {'code': 'bundle', 'message': 'no-such-folder: no such bundle folder'}
    no-such-folder: no such bundle folder; check the path, or build one with `pmclip-deploy export`
    """

    exit_code = 1
    code = "error"

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message, hint)  # both in ``args``, from which an error is unpickled
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}; {self.hint}" if self.hint else self.message


class UsageError(PmclipError):
    """The command line or an argument is wrong.

    >>> import pmclip_deploy as pm
    >>> pm.UsageError("the question is empty", "ask something").hint
    'ask something'
    """

    exit_code = 2
    code = "usage"


class InputError(PmclipError):
    """The image or the question file cannot be read.

    >>> import pmclip_deploy as pm
    >>> try:
    ...     pm.load().ask(b"", "is there a fracture?")
    ... except pm.InputError as error:
    ...     print(error)
    bytes: is empty; give what a DICOM, PNG or JPEG file holds, from its first byte on
    """

    exit_code = 3
    code = "input"


class NoPictureError(InputError):
    """The file may be whole, and it holds no picture: a report, a waveform, a structured document.

    >>> import pmclip_deploy as pm
    >>> try:
    ...     pm.load().ask(b"Dear colleague, ...", "is there a fracture?")
    ... except pm.NoPictureError as error:
    ...     print(error)
    bytes: is not a DICOM, PNG or JPEG file; give one of these
    """

    code = "input.no_picture"


class BundleError(PmclipError):
    """A bundle, a checkpoint or an index is missing, broken or was tampered with.

    >>> import pmclip_deploy as pm
    >>> pm.BundleError.code, pm.BundleError.exit_code
    ('bundle', 4)
    """

    exit_code = 4
    code = "bundle"


class ParityError(PmclipError):
    """An exported model is further from its fp32 PyTorch reference than the parity gate allows.

    The commands ``export``, ``parity`` and ``bench`` raise it.

    >>> import pmclip_deploy as pm
    >>> pm.ParityError.code, pm.ParityError.exit_code
    ('parity', 5)
    """

    exit_code = 5
    code = "parity"


class GateError(PmclipError):
    """A finding did not pass the gate of its validation.

    The command ``train finding`` raises it.

    >>> import pmclip_deploy as pm
    >>> pm.GateError.code, pm.GateError.exit_code
    ('gate', 5)
    """

    exit_code = 5
    code = "gate"


class DeviceError(PmclipError):
    """The device or the backend that was asked for is not there.

    >>> import pmclip_deploy as pm
    >>> pm.DeviceError.code, pm.DeviceError.exit_code
    ('device', 6)
    """

    exit_code = 6
    code = "device"


class TrainingError(PmclipError):
    """Training cannot go on: the loss is not a number, or memory is full.

    The commands under ``train`` raise it.

    >>> import pmclip_deploy as pm
    >>> pm.TrainingError.code, pm.TrainingError.exit_code
    ('training', 1)
    """

    exit_code = 1
    code = "training"
