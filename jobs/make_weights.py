"""Make the packaged 8-bit weights from the published float ones: `python jobs/make_weights.py FLOAT.pt [OUT]`."""

import json
import sys
from pathlib import Path

from safetensors.numpy import save

from batchverify.backbones import (
    ARCHITECTURE,
    METADATA_KEY,
    dequantise,
    fingerprint,
    packaged_weights,
    quantise,
    read_tensors,
)


def packaged_bytes(source: Path) -> bytes:
    """The packaged file's bytes: a function of the float tensors alone."""
    stored = quantise(read_tensors(source))
    about = {
        "architecture": ARCHITECTURE,
        "fingerprint": fingerprint(dequantise(stored)),
        "format": "int8 per output channel, weight = int8 * scale",
        "source": source.name,
    }
    return save(stored, metadata={METADATA_KEY: json.dumps(about, sort_keys=True)})


if __name__ == "__main__":
    target = Path(sys.argv[2]) if len(sys.argv) > 2 else packaged_weights()
    target.write_bytes(packaged_bytes(Path(sys.argv[1])))
    print(f"{target}: {target.stat().st_size:,} bytes")
