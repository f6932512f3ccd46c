"""Described backbones: the messages of an ONNX file and the description of the faces that it takes.

OpenVINO, which reads the network itself, is not fuzzed.
"""

from __future__ import annotations

import json

from onnx_files import write_model
from target import Target, require

from batchverify.documents import read_document
from batchverify.embedding.description import COLOURS, PRESETS, SIZES, Description
from batchverify.embedding.onnx_file import OnnxFile
from batchverify.errors import ArtifactError


class DescriptionTarget(Target):
    """The first byte chooses an ONNX file, whose metadata may hold a description, or a description alone."""

    def seeds(self) -> list[bytes]:
        """Models with tensors inside and beside them; a preset and a whole description."""
        whole = {"crop": "align", "template": "arcface", "size": 112, "colour": "BGR", "mean": [1, 2.5, 3]}
        texts = [json.dumps({**whole, "scale": 128, "output": 0}), json.dumps({"preset": min(PRESETS)})]
        points = [[38, 51.5], [73.5, 51.5], [56, 71.7], [41.5, 92.3], [70.7, 92.2]]
        texts.append(json.dumps({**whole, "template": points, "scale": 1}))
        models = [
            write_model(self.folder / "a.onnx", None, dimension=4, metadata={"batchverify": text}).read_bytes()
            for text in texts
        ]
        (self.folder / "beside").write_bytes(bytes(9))
        models.append(write_model(self.folder / "a.onnx", None, dimension=4, location="beside").read_bytes())
        return [*(b"\0" + model for model in models), *(b"\1" + text.encode() for text in texts)]

    def run(self, data: bytes) -> None:
        """Read the file, then the description."""
        file, text = self.folder / "a.onnx", data[1:]
        nodes: tuple[tuple[str, str], ...] = ()
        try:
            if not data or data[0] % 2 == 0:
                file.write_bytes(data[1:])
                model = OnnxFile.read(file)
                require(len(model.digest()) == 64, "no digest")
                inside = all(path.is_relative_to(self.folder.resolve()) for path in model.external.values())
                require(inside, f"outside of the folder: {model.external}")
                text, nodes = model.metadata.get("batchverify", "{}").encode(), model.first_nodes
            try:
                document = read_document(text)
            except ValueError:
                return
            description = Description.parse(document, str(file), nodes)
        except ArtifactError as exc:
            require(str(file) in str(exc) and len(str(exc)) < 2000, f"names no file, or too much: {exc}")
            return
        least, most = SIZES
        require(least <= description.size <= most and description.colour in COLOURS, f"{description}")
        require(all(scale > 0 for scale in description.scale), f"{description}")
        require(bool(description.normalisation and description.identity), f"{description}")


TARGET = DescriptionTarget
