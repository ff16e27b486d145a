"""How fast a radiograph becomes a tower's input, beside open_clip's path, and how fast it is decoded, beside other decoders.

    python -m pmclip_deploy.benchmarks.preprocessing [--picture FILE.dcm] [--repeats 15] [--output FILE.jsonl]

Without a picture it is a synthetic one of 2048 x 2500 and 12 of 16 bits: a CT scaled up, with noise. Whatever is timed was compared first:
the tensors may not differ by one grey level, nor the decoded samples at all. torch gets one thread, with which its little work is done
soonest. Decoders not installed are named and left out; what each is compiled with is its wheel's.
"""

import argparse
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pmclip_deploy.benchmarks import harness
from pmclip_deploy.benchmarks.peers import LITE, VIT
from pmclip_deploy.benchmarks.results import Run, append, command_line
from pmclip_deploy.benchmarks.stages import dataset_from_stored, radiograph_from_ct, rendering
from pmclip_deploy.imaging.decoders.frame import samples_from_codestream
from pmclip_deploy.imaging.decoders.layout import Layout
from pmclip_deploy.imaging.dicom_file import image_from_file, reading
from pmclip_deploy.imaging.stored import layout_from_dataset, stored_values
from pmclip_deploy.machine import stamp, versions
from pmclip_deploy.threads import cpu_threads
from pmclip_deploy.train.backbones import BACKBONES

RLE, JPEG_LS, JPEG_2000 = "1.2.840.10008.1.2.5", "1.2.840.10008.1.2.4.80", "1.2.840.10008.1.2.4.90"
NAMES = {RLE: "RLE Lossless", JPEG_LS: "JPEG-LS Lossless", JPEG_2000: "JPEG 2000 Lossless"}

Array = Any
Job = Callable[[], Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    stored = radiograph_from_ct() if options.picture is None else stored_from_dicom(options.picture)
    rows, columns = stored.shape
    what = f"{columns} x {rows}, {'synthetic' if options.picture is None else 'real'}"
    beside = versions("torch", "torchvision", "open_clip_torch", "imagecodecs", "pylibjpeg-rle")
    run = Run(command_line("python -m pmclip_deploy.benchmarks.preprocessing"), {**stamp(cpu_threads()), "beside": beside})
    made = []
    for model in (LITE, VIT):
        made += compare(run, model, f"window and preprocess, {what}", preprocessing_jobs(stored, model), options.repeats)
    for syntax in (RLE, JPEG_LS, JPEG_2000):
        made += compare(run, "any", f"decode {NAMES[syntax]}, {what}", decoding_jobs(stored, syntax), max(3, options.repeats // 3))
    if options.output:
        append(options.output, made)


def compare(run: Run, model: str, part: str, jobs: Mapping[str, Job], repeats: int) -> list[dict[str, Any]]:
    """The first job's time over each one's, round by round."""
    measured = harness.interleaved({name: partial(harness.burst, job) for name, job in jobs.items()}, repeats)
    ours = measured[next(iter(jobs))]
    rows = []
    print(f"\n{model}, {part}")
    for name, of in measured.items():
        all_of, ratio = harness.pooled(of), harness.ratio(of, ours)
        print(f"  {name:44} {all_of.figures['p50_ms']:9.2f} ms  {ratio['ratio']:6.2f} times ours "
              f"({ratio['ratio_p25']:.2f} to {ratio['ratio_p75']:.2f})")  # fmt: skip
        figures = {
            **all_of.figures,
            "times_ours": ratio["ratio"],
            "times_ours_p25": ratio["ratio_p25"],
            "times_ours_p75": ratio["ratio_p75"],
        }
        rows.append(run.row(model, name, part, "stage", figures, threads=cpu_threads(), samples=all_of.samples))
    return rows


# --- windowing and preprocessing ------------------------------------------------------------------------------------------------


def preprocessing_jobs(stored: Array, model: str) -> dict[str, Job]:
    """{system: from (H, W) u16 stored values to (3, S, S) f32}"""
    import torch
    from open_clip.transform import image_transform

    torch.set_num_threads(1)
    preprocess, dataset = BACKBONES[model].preprocess, dataset_from_stored(stored)
    center, width = float(dataset.WindowCenter), float(dataset.WindowWidth)
    transform = image_transform(preprocess.size, False, mean=preprocess.mean, std=preprocess.std, resize_mode=preprocess.resize)

    def windowed() -> Image.Image:
        unit = np.clip((stored.astype(np.float64) - (center - 0.5)) / (width - 1) + 0.5, 0, 1)  # PS3.3 C.11.2.1.2.1
        return Image.fromarray((unit * 255 + 0.5).astype(np.uint8))

    jobs: dict[str, Job] = {
        "pmclip-deploy": rendering(dataset, preprocess)[0],
        "NumPy, open_clip's transform of a grey image": lambda: transform(windowed()).numpy(),
        "NumPy, open_clip's transform of an RGB image": lambda: transform(windowed().convert("RGB")).numpy(),
    }
    expected = jobs["pmclip-deploy"]()
    for name, job in jobs.items():
        levels = np.abs(job() - expected) * np.reshape(preprocess.std, (3, 1, 1)) * 255
        assert levels.max() < 0.01, (name, levels.max())
    return jobs


# --- decoders -------------------------------------------------------------------------------------------------------------------


def decoding_jobs(stored: Array, syntax: str) -> dict[str, Job]:
    """Every decoder of one transfer syntax that is installed, ours first; each was compared with what was encoded."""
    bits = max(8, int(stored.max()).bit_length())
    layout = Layout(stored.shape[0], stored.shape[1], 1, 16, bits, bits - 1, False, "MONOCHROME2", 0)
    frame = encoded(stored, syntax, bits)
    jobs: dict[str, Job] = {"pmclip-deploy": lambda: samples_from_codestream(syntax, frame, layout)[0]}
    jobs["GDCM"] = lambda: gdcm_samples(frame, layout, syntax)
    others = {RLE: (pylibjpeg_rle, imagecodecs), JPEG_LS: (imagecodecs,), JPEG_2000: (pylibjpeg_openjpeg, imagecodecs)}
    for other in others[syntax]:
        try:
            jobs |= other(frame, layout, syntax)
        except ImportError as error:
            print(f"left out: {other.__name__} ({error})")
    for name, job in list(jobs.items()):
        try:
            same = np.array_equal(np.asarray(job()).reshape(stored.shape), stored)
        except Exception as error:
            same = False
            print(f"{name}: {type(error).__name__}: {' '.join(str(error).split())[:100]}")
        if not same:
            print(f"left out: {name}, which does not decode this {NAMES[syntax]} to what was encoded")
            del jobs[name]
    assert "pmclip-deploy" in jobs
    return jobs


def encoded(stored: Array, syntax: str, bits: int) -> bytes:
    """One frame of (H, W) u16 in a transfer syntax."""
    if syntax == JPEG_2000:
        from openjpeg.utils import encode_array

        return bytes(encode_array(stored, bits_stored=bits))
    if syntax == JPEG_LS:
        import jpeg_ls  # type: ignore[import-untyped]

        return bytes(jpeg_ls.encode_array(stored))
    from pydicom.encaps import get_frame

    dataset = dataset_from_stored(stored, bits)
    dataset.compress(RLE, encoding_plugin="pydicom")
    return bytes(get_frame(dataset.PixelData, 0, number_of_frames=1))


def gdcm_samples(frame: bytes, layout: Layout, syntax: str) -> Array:
    """(H * W,) u16 of one frame."""
    import gdcm  # type: ignore[import-untyped]

    image = gdcm.Image()
    image.SetNumberOfDimensions(2)
    image.SetDimensions((layout.columns, layout.rows, 1))
    image.SetPhotometricInterpretation(gdcm.PhotometricInterpretation(gdcm.PhotometricInterpretation.MONOCHROME2))
    image.SetTransferSyntax(gdcm.TransferSyntax(gdcm.TransferSyntax.GetTSType(syntax)))
    image.SetPixelFormat(gdcm.PixelFormat(1, 16, layout.stored, layout.high_bit, 0))
    element = gdcm.DataElement(gdcm.Tag(0x7FE0, 0x0010))
    fragment, fragments = gdcm.Fragment(), gdcm.SequenceOfFragments.New()
    fragment.SetByteStringValue(frame)
    fragments.AddFragment(fragment)
    element.SetValue(fragments.__ref__())
    image.SetDataElement(element)
    return np.frombuffer(image.GetBuffer().encode("utf-8", "surrogateescape"), "<u2")


def pylibjpeg_rle(frame: bytes, layout: Layout, syntax: str) -> dict[str, Job]:
    """{system: a job that decodes the frame to (H * W,) u16}"""
    from rle.utils import decode_frame

    def job() -> Array:
        return np.frombuffer(decode_frame(frame, layout.pixels, layout.allocated, "<"), "<u2")

    return {"pylibjpeg-rle": job}


def pylibjpeg_openjpeg(frame: bytes, layout: Layout, syntax: str) -> dict[str, Job]:
    """As `pylibjpeg_rle`, for JPEG 2000."""
    from openjpeg.utils import decode_pixel_data

    return {"pylibjpeg-openjpeg": lambda: np.frombuffer(decode_pixel_data(frame, version=2), "<u2")}


def imagecodecs(frame: bytes, layout: Layout, syntax: str) -> dict[str, Job]:
    """As `pylibjpeg_rle`, for the three syntaxes."""
    import imagecodecs as codecs

    decode: dict[str, Job] = {
        RLE: lambda: np.frombuffer(codecs.dicomrle_decode(frame, "<u2"), "<u2"),
        JPEG_LS: lambda: codecs.jpegls_decode(frame),
        JPEG_2000: lambda: codecs.jpeg2k_decode(frame, numthreads=cpu_threads()),
    }
    return {"imagecodecs": decode[syntax]}


def stored_from_dicom(path: Path) -> Array:
    """(H, W) u16 of a grey radiograph."""
    with reading(str(path)) as stack:
        image = image_from_file(str(path), stack)
        layout = layout_from_dataset(image.dataset)
        stored, _ = stored_values(image, layout, 0, 1, [])
    assert stored.ndim == 2 and stored.dtype.itemsize == 2 and int(stored.min()) >= 0, (
        "give a grey picture of 16 bits without negative values"
    )
    return np.ascontiguousarray(stored).astype(np.uint16)


if __name__ == "__main__":
    main()
