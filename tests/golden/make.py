"""Makes the reference vectors in this folder: `python tests/golden/make.py` with torchvision, open_clip and imagecodecs installed.

preprocess.json the SHA-256 of the float32 tensors that open_clip's image_transform gives for small pictures, keyed
                <mode>_<resize>_<size>_<height>x<width>
htj2k_*.j2k     HTJ2K codestreams made by OpenJPH: no encoder of that kind is among our dependencies
"""

import json
from hashlib import sha256
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
CASES = [
    (mode, resize, 24, height, width)
    for mode in ("gray", "rgb")
    for resize in ("shortest", "squash")
    for height, width in ((61, 97), (97, 61), (24, 24), (25, 31), (9, 14))
]


def pattern(height: int, width: int, channels: int) -> np.ndarray:
    """A picture with ramps, edges and fine texture, from whole numbers alone. -> (H, W) or (H, W, 3) u8"""
    y, x, c = np.mgrid[0:height, 0:width, 0:channels]
    values = (x * 7 + y * 5 + c * 31 + (x * y) % 23 * 9 + (x // 8 + y // 8) % 2 * 90) % 256
    return np.squeeze(values.astype(np.uint8), axis=2) if channels == 1 else values.astype(np.uint8)


def pattern12(height: int = 48, width: int = 64) -> np.ndarray:
    """12-bit values in 16. -> (H, W) u16"""
    y, x = np.mgrid[0:height, 0:width]
    return ((x * 61 + y * 37 + (x * y) % 97) % 4096).astype(np.uint16)


if __name__ == "__main__":
    try:
        import open_clip
        from PIL import Image

        hashes = {}
        for mode, resize, size, height, width in CASES:
            options = {"mean": MEAN, "std": STD, "resize_mode": resize, "interpolation": "bicubic"}
            transform = open_clip.transform.image_transform(size, is_train=False, **options)
            image = Image.fromarray(pattern(height, width, 1 if mode == "gray" else 3)).convert("RGB")
            hashes[f"{mode}_{resize}_{size}_{height}x{width}"] = sha256(transform(image).numpy().tobytes()).hexdigest()
        (HERE / "preprocess.json").write_text(json.dumps(hashes, indent=1) + "\n")
    except ImportError as error:
        print("preprocess.json not made:", error)
    try:
        import imagecodecs

        (HERE / "htj2k_gray12.j2k").write_bytes(imagecodecs.htj2k_encode(pattern12(), reversible=True))
        (HERE / "htj2k_rgb8.j2k").write_bytes(imagecodecs.htj2k_encode(pattern(48, 64, 3), reversible=True))
    except ImportError as error:
        print("htj2k_*.j2k not made:", error)
