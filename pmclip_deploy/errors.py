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
    exit_code = 1


class UsageError(PmclipError):
    exit_code = 2


class InputError(PmclipError):
    exit_code = 3


class NoPictureError(InputError):
    pass


class BundleError(PmclipError):
    exit_code = 4


class ParityError(PmclipError):
    exit_code = 5


class GateError(PmclipError):
    exit_code = 5


class DeviceError(PmclipError):
    exit_code = 6


class TrainingError(PmclipError):
    exit_code = 1
