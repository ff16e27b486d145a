"""Image features of MEVF (Nguyen et al., MICCAI 2019): denoising auto-encoder and MAML network, read safely, joined with CLIP's."""

import pickletools
import warnings
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from safetensors.torch import load as tensors_from_bytes
from torch import Tensor, nn

from pmclip_deploy.errors import BundleError
from pmclip_deploy.imaging.preprocess import grey_from_pixels
from pmclip_deploy.imaging.read import picture_from_path
from pmclip_deploy.train.pickles import check_pickles

AUTOENCODER_SIZE, MAML_SIZE = 128, 84  # pixels a side
CODE = 16  # channels of the auto-encoder's code
WIDTH = 64  # of the feature that each of the two networks gives
NUMPY = {"numpy.core.multiarray _reconstruct", "numpy ndarray", "numpy dtype"}  # all that a pickled array names


def grey_from_path(path: Path, size: int) -> Tensor:
    """(1, size, size) f32 in 0..1, both sides scaled to ``size``, as MEVF prepares its images. Raises InputError."""
    return torch.from_numpy(grey_from_pixels(picture_from_path(path).pixels, size))


class AutoEncoder(nn.Module):
    """(B, 1, 128, 128) f32 in 0..1 -> its reconstruction. The layers' names are those of the authors' file."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 64, 3, padding=1)
        self.conv2 = nn.Conv2d(64, 32, 3, padding=1)
        self.conv3 = nn.Conv2d(32, CODE, 3, padding=1)
        self.tran_conv1 = nn.ConvTranspose2d(CODE, 32, 3, stride=2, padding=1, output_padding=1)
        self.conv4 = nn.Conv2d(32, 32, 3, padding=1)
        self.tran_conv2 = nn.ConvTranspose2d(32, 64, 3, stride=2, padding=1, output_padding=1)
        self.conv5 = nn.Conv2d(64, 1, 3, padding=1)
        self.halve = nn.MaxPool2d(2)

    def encode(self, pixels: Tensor) -> Tensor:
        """(B, 1, S, S) -> (B, 16, S / 4, S / 4) f32."""
        x = self.halve(torch.relu(self.conv1(pixels)))
        x = self.halve(torch.relu(self.conv2(x)))
        return torch.relu(self.conv3(x))

    def decode(self, code: Tensor) -> Tensor:
        x = torch.relu(self.conv4(torch.relu(self.tran_conv1(code))))
        return torch.sigmoid(self.conv5(torch.relu(self.tran_conv2(x))))

    def forward(self, pixels: Tensor) -> Tensor:
        return self.decode(self.encode(pixels))


class MamlNetwork(nn.Module):
    """(B, 1, 84, 84) f32 in 0..1 -> (B, 64) f32: four strided convolutions, each with ReLU and batch norm, then the mean over places."""

    def __init__(self) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList(nn.Conv2d(inputs, WIDTH, 3, stride=2, padding=1) for inputs in (1, WIDTH, WIDTH, WIDTH))
        self.norms = nn.ModuleList(nn.BatchNorm2d(WIDTH, eps=1e-5, momentum=0.05) for _ in self.convolutions)  # MEVF's, main.py

    def forward(self, pixels: Tensor) -> Tensor:
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            pixels = norm(torch.relu(convolution(pixels)))
        return pixels.mean((2, 3))


class ImageFeatures(nn.Module):
    """(clip (B, D), autoencoder_pixels (B, 1, 128, 128), maml_pixels (B, 1, 84, 84)) -> objects (B, 1, V) f32, reconstruction or None.

    V is ``clip_dim`` (0 without CLIP) plus 64 for each network, in the order CLIP, MAML, auto-encoder. CLIP's embedding is taken as
    its tower gives it, not normalised, as in PubMedCLIP. An input that nothing needs may be None. The reconstruction,
    (B, 1, 128, 128) f32, is for the loss. In place of the auto-encoder's pixels its code, (B, 16, 32, 32) f32, is taken too: where it is
    not trained nothing has to compute that again. It then gives no reconstruction.
    """

    def __init__(self, clip_dim: int, autoencoder: AutoEncoder | None = None, maml: MamlNetwork | None = None) -> None:
        super().__init__()
        self.clip_dim, self.autoencoder, self.maml = clip_dim, autoencoder, maml
        self.convert = nn.Linear(CODE * (AUTOENCODER_SIZE // 4) ** 2, WIDTH) if autoencoder else None
        self.dim = clip_dim + WIDTH * ((autoencoder is not None) + (maml is not None))

    def forward(self, clip: Tensor | None, autoencoder_pixels: Tensor | None, maml_pixels: Tensor | None) -> tuple[Tensor, Tensor | None]:
        parts, reconstruction = list[Tensor](), None
        if self.clip_dim:
            assert clip is not None
            parts.append(clip)
        if self.maml is not None:
            parts.append(self.maml(maml_pixels))
        if self.autoencoder is not None and self.convert is not None:
            assert autoencoder_pixels is not None
            encoded = autoencoder_pixels.shape[1] == CODE
            code = autoencoder_pixels if encoded else self.autoencoder.encode(autoencoder_pixels)
            reconstruction = None if encoded else self.autoencoder.decode(code)
            parts.append(self.convert(code.flatten(1)))
        return torch.cat(parts, dim=1)[:, None], reconstruction


def features_of_width(width: int, prefix: str, tensors: dict[str, Tensor]) -> ImageFeatures:
    """The networks that ``tensors`` name under ``prefix``, untrained, and as much of CLIP's features as is left of ``width``."""
    autoencoder = AutoEncoder() if f"{prefix}convert.weight" in tensors else None
    maml = MamlNetwork() if f"{prefix}maml.convolutions.0.weight" in tensors else None
    return ImageFeatures(width - ImageFeatures(0, autoencoder, maml).dim, autoencoder, maml)


def autoencoder_from_file(path: Path) -> AutoEncoder:
    """From the authors' ``pretrained_ae.pth`` or from what `train autoencoder` wrote. Raises BundleError."""
    return _filled(AutoEncoder(), path, lambda data: torch.load(BytesIO(data), map_location="cpu", weights_only=True))


def maml_from_file(path: Path) -> MamlNetwork:
    """From the authors' ``pretrained_maml.weights`` (it has no batch norms: they start fresh) or from `train maml`. Raises BundleError."""
    network = MamlNetwork()
    return _filled(network, path, lambda data: {**network.state_dict(), **_convolutions_from_pickle(data)})


Network = TypeVar("Network", bound=nn.Module)


def _filled(network: Network, path: Path, tensors_from_pickle: Callable[[bytes], dict[str, Tensor]]) -> Network:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise BundleError(f"{path}: cannot be read ({error.strerror})", "check the path") from None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's remarks on pickles; what matters is raised
            is_safetensors = data[8:9] == b"{"  # after the header's length
            if not is_safetensors:
                check_pickles(data)
            network.load_state_dict(tensors_from_bytes(data) if is_safetensors else tensors_from_pickle(data))
    except Exception:  # pickle, zip, shapes and keys fail in their own ways
        name = type(network).__name__
        raise BundleError(f"{path}: broken, or not the weights of MEVF's {name}", "give the authors' file or a trained one") from None
    return network


def _convolutions_from_pickle(data: bytes) -> dict[str, Tensor]:
    """The authors' pickled dictionary of float32 arrays, scanned for names and bytes; nothing of it is run. Raises ValueError.

    torch's restricted unpickler does not know the byte strings of pickle's protocol 3. The convolutions are TensorFlow's, (height,
    width, inputs, outputs).
    """
    shapes: dict[str, tuple[int, ...]] = {"conv1": (3, 3, 1, WIDTH), "b1": (WIDTH,)}
    for i in (2, 3, 4):
        shapes |= {f"conv{i}": (3, 3, WIDTH, WIDTH), f"b{i}": (WIDTH,)}
    tensors, name, columns_first = {}, "", False
    for operation, value, _ in pickletools.genops(data):
        if "GLOBAL" in operation.name and value not in NUMPY:
            raise ValueError("not arrays alone")
        if operation.name == "BINUNICODE" and value in shapes:
            name = value
        elif operation.name in ("NEWTRUE", "NEWFALSE"):  # an array's last one stands right before its bytes
            columns_first = operation.name == "NEWTRUE"
        elif operation.name == "BINBYTES" and isinstance(value, bytes):
            if columns_first:
                raise ValueError("not in rows")
            array = torch.from_numpy(np.frombuffer(value, "<f4").reshape(shapes[name]).copy())
            layer = f"convolutions.{int(name[-1]) - 1}"
            tensors[f"{layer}.bias" if array.ndim == 1 else f"{layer}.weight"] = array if array.ndim == 1 else array.permute(3, 2, 0, 1)
    if len(tensors) != len(shapes):
        raise ValueError("not all arrays")
    return tensors
