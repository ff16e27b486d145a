"""The errors a user can meet; each carries the process's exit code.

    PmclipError                  1  a bug of ours if it is none of the following
    ├── UsageError               2  the command line or an argument is wrong
    ├── InputError               3  the image or question file cannot be read
    │   └── NoPictureError          the file may be whole, and holds no picture
    ├── BundleError              4  a bundle or checkpoint is missing, broken or tampered with
    ├── ParityError              5  a parity gate failed
    ├── GateError                5  a finding did not pass the gate of its validation
    ├── DeviceError              6  the device or backend asked for is not there
    └── TrainingError            1  training cannot go on: the loss is no number, or memory is full

A message is one line: what, where, and what to do next. It never holds a patient attribute.
"""


class PmclipError(Exception):
    """Any error that a user can meet; caught alone, it catches all that follow."""

    exit_code = 1


class UsageError(PmclipError):
    """The command line or an argument is wrong."""

    exit_code = 2


class InputError(PmclipError):
    """The image or the question file cannot be read."""

    exit_code = 3


class NoPictureError(InputError):
    """The file may be whole, and it holds no picture: a report, a waveform, a structured document."""


class BundleError(PmclipError):
    """A bundle or a checkpoint is missing, broken or was tampered with."""

    exit_code = 4


class ParityError(PmclipError):
    """An exported model is further from its fp32 PyTorch reference than the parity gate allows."""

    exit_code = 5


class GateError(PmclipError):
    """A finding did not pass the gate of its validation."""

    exit_code = 5


class DeviceError(PmclipError):
    """The device or the backend that was asked for is not there."""

    exit_code = 6


class TrainingError(PmclipError):
    """Training cannot go on: the loss is not a number, or memory is full."""

    exit_code = 1
