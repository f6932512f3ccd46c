"""What one writes with facenet-pytorch's documented API: `python benchmarks/peer.py MANIFEST OUT CROP DEVICE`.

A DataLoader with two workers decodes; its MTCNN finds faces in batches (or a fixed crop is cut); the model embeds
in batches of 32; cosines of the pairs are written. Every image once, which is more than most such scripts do.
"""

import sys
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from facenet import eager_network
from facenet_pytorch import MTCNN
from PIL import Image
from torch.utils.data import DataLoader, Dataset

BATCH = 32
CENTER = (0.24, 0.192, 0.76, 0.82)


class Pictures(Dataset):
    """Decoded pictures, or their fixed crops as arrays."""

    def __init__(self, paths: list[Path], crop: str) -> None:
        self.paths, self.crop = paths, crop

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, place: int) -> Image.Image | np.ndarray:
        picture = Image.open(self.paths[place]).convert("RGB")
        if self.crop == "detect":
            return picture
        left, top, right, bottom = (round(share * side) for share, side in zip(CENTER, picture.size * 2, strict=True))
        return np.asarray(picture.crop((left, top, right, bottom)).resize((160, 160)))


@torch.inference_mode()
def main(manifest: Path, output: Path, crop: str, device: str) -> None:
    """Embed the images of a manifest and write the cosine of every pair."""
    frame = pd.read_csv(manifest)
    names = pd.unique(frame[["image_a", "image_b"]].to_numpy().ravel())
    network = eager_network().to(device)
    mtcnn = MTCNN(
        image_size=160,
        margin=44,
        selection_method="center_weighted_size",
        post_process=True,
        device=device,
    )
    vectors: dict[str, torch.Tensor] = {}
    pictures = Pictures([manifest.parent / name for name in names], crop)
    for number, batch in enumerate(DataLoader(pictures, BATCH, num_workers=2, collate_fn=list)):
        if crop == "detect":
            try:
                faces = mtcnn(batch)
            except ValueError:  # its batches fail when a picture has no face
                faces = [mtcnn(picture) for picture in batch]
        else:
            faces = [(torch.from_numpy(each).permute(2, 0, 1).float() - 127.5) / 128 for each in batch]
        kept = [place for place, face in enumerate(faces) if face is not None]
        inputs = torch.stack([faces[place] for place in kept]).to(device)
        rows = torch.nn.functional.normalize(network(inputs)).cpu()
        vectors |= {names[number * BATCH + place]: row for place, row in zip(kept, rows, strict=True)}
    pairs = zip(frame.image_a, frame.image_b, strict=True)
    cosines = [float(vectors[a] @ vectors[b]) if a in vectors and b in vectors else None for a, b in pairs]
    frame.assign(similarity=pd.Series(cosines, frame.index, dtype=float)).to_parquet(output)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], sys.argv[4])
