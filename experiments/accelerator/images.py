"""Images small enough to carry: an .npz data set as JPEG mosaics in one file, and back.

    python -m accelerator.images pack SET.npz CARRIED.npz [MEGABYTES]
    python -m accelerator.images unpack CARRIED.npz SET.npz

A mosaic is 30 x 30 images, so that the tables of JPEG are stored once for 900 of them. Quality 98 without chroma
subsampling: CIFAR-10 shrinks from 184 MB to about 40 MB at a PSNR of 49 dB. The images are changed (by up to about ten
of 255 levels), so what is trained on them is tested on them, and its numbers say so.
"""

import io
import sys
from pathlib import Path

import numpy as np
from PIL import Image

SIDE = 30
"""Images along one side of a mosaic."""
QUALITY = 98
"""Of JPEG; above it a file grows faster than its PSNR."""
_SPLITS = ("train", "test")


def pack(source: Path, target: Path, quality: int = QUALITY) -> int:
    """Write the data set `source` (see bdjax/datasets/npz.py) as mosaics.

    Args:
      source: uint8 `x_train`, `x_test` [N, H, W, C] with C 1 or 3, labels `y_train`, `y_test` [N], perhaps `classes`.
      target: the file that is written.
      quality: of JPEG, 1 to 100.

    Returns: its size in bytes.
    """
    arrays: dict[str, np.ndarray] = {}
    with np.load(source, allow_pickle=False) as given:
        for split in _SPLITS:
            images = given[f"x_{split}"]
            encoded = [_encode(mosaic, quality) for mosaic in _mosaics(images)]
            arrays[f"blob_{split}"] = np.frombuffer(b"".join(encoded), np.uint8)
            arrays[f"ends_{split}"] = np.cumsum([len(part) for part in encoded])
            arrays[f"shape_{split}"] = np.array(images.shape)
            arrays[f"y_{split}"] = given[f"y_{split}"]
        if "classes" in given.files:
            arrays["classes"] = given["classes"]
    np.savez(target, **arrays)  # type: ignore[arg-type]
    return target.stat().st_size


def unpack(source: Path, target: Path) -> None:
    """Write what :func:`pack` wrote as an .npz data set again, uncompressed."""
    arrays: dict[str, np.ndarray] = {}
    with np.load(source, allow_pickle=False) as given:
        for split in _SPLITS:
            blob, ends, shape = (given[f"{name}_{split}"] for name in ("blob", "ends", "shape"))
            parts = np.split(blob, ends[:-1])
            tiles = [_tiles(np.asarray(Image.open(io.BytesIO(part.tobytes()))), tuple(shape[1:])) for part in parts]
            arrays[f"x_{split}"] = np.concatenate(tiles)[: shape[0]]
            arrays[f"y_{split}"] = given[f"y_{split}"]
        if "classes" in given.files:
            arrays["classes"] = given["classes"]
    np.savez(target, **arrays)  # type: ignore[arg-type]


def digits(target: Path) -> None:
    """Write scikit-learn's digits as they are, 8x8x1: 400 to train on and 200 to test on."""
    from sklearn.datasets import load_digits

    scans, labels = load_digits(return_X_y=True)
    images = np.round(np.asarray(scans)[:600].reshape(-1, 8, 8, 1) * (255 / 16)).astype(np.uint8)
    labels = np.asarray(labels)[:600].astype(np.int32)
    np.savez(target, x_train=images[:400], y_train=labels[:400], x_test=images[400:], y_test=labels[400:])


def _mosaics(images: np.ndarray) -> list[np.ndarray]:
    """[N, H, W, C] -> mosaics [30 H, 30 W, C]; the last one is filled up with its last image."""
    count, (height, width, channels) = SIDE * SIDE, images.shape[1:]
    mosaics = []
    for start in range(0, len(images), count):
        part = images[start : start + count]
        part = np.concatenate([part, np.repeat(part[-1:], count - len(part), axis=0)])
        grid = part.reshape(SIDE, SIDE, height, width, channels).transpose(0, 2, 1, 3, 4)
        mosaics.append(grid.reshape(SIDE * height, SIDE * width, channels))
    return mosaics


def _tiles(mosaic: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    """A mosaic as images [900, H, W, C]."""
    height, width, channels = shape
    grid = mosaic.reshape(SIDE, height, SIDE, width, channels)
    return grid.transpose(0, 2, 1, 3, 4).reshape(-1, height, width, channels)


def _encode(mosaic: np.ndarray, quality: int) -> bytes:
    picture = Image.fromarray(mosaic.squeeze(-1) if mosaic.shape[-1] == 1 else mosaic)
    out = io.BytesIO()
    picture.save(out, "JPEG", quality=quality, subsampling=0, optimize=True)
    return out.getvalue()


def main(argv: list[str]) -> None:
    """Carry out `pack` or `unpack`; a packed file larger than MEGABYTES is refused."""
    if len(argv) not in (3, 4) or argv[0] not in ("pack", "unpack"):
        raise SystemExit(__doc__)
    source, target = Path(argv[1]), Path(argv[2])
    if argv[0] == "unpack":
        return unpack(source, target)
    size = pack(source, target)
    limit = float(argv[3]) if len(argv) == 4 else float("inf")
    if size > limit * 1e6:
        target.unlink()
        raise SystemExit(f"{source} takes {size / 1e6:.1f} MB as mosaics, more than {limit:g}. Give a smaller set.")
    sys.stdout.write(f"{target.name}: {size / 1e6:.1f} MB\n")


if __name__ == "__main__":
    main(sys.argv[1:])
