"""What the benchmarks share: the machine's name, and the place where tables are kept."""

import re
from datetime import date
from importlib.metadata import version
from pathlib import Path

import torch

from batchverify.runtime.devices import available_cpus

BESIDE = " --beside CHECKOUT"
RESULTS = Path(__file__).parent / "RESULTS.md"


# Matrix and vector extensions that decide how fast the networks run.
EXTENSIONS = (
    "amx_int8",
    "amx_bf16",
    "avx512_bf16",
    "avx512_vnni",
    "avx_vnni",
    "avx512f",
    "avx2",
    "asimddp",
    "i8mm",
)


def machine() -> str:
    """The CPU's name, family and extensions, how many CPUs are in use, the GPU if there is one, and versions."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf8").splitlines()
    facts = {key.strip(): value.strip() for key, _, value in (each.partition(":") for each in lines)}
    name = facts.get("model name", "unknown CPU")
    # CPUs that multiply twice as much as others call themselves by one name.
    family = f"family {facts.get('cpu family', '?')} model {facts.get('model', '?')}"
    flags = (facts.get("flags") or facts.get("Features") or "").split()
    has = " ".join(each for each in EXTENSIONS if each in flags) or "no vector extension known here"
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    versions = f"torch {torch.__version__}, OpenVINO {version('openvino')}"
    return f"{name} ({family}; {has}), {available_cpus()} CPUs{gpu}, {versions}"


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def publish(title: str, command: str, body: str, *, record: bool) -> None:
    """Print a result; with `record`, put it into RESULTS.md in place of the last one of the same command."""
    print(body)
    if not record:
        return
    head, *sections = re.split("(?m)^(?=## )", RESULTS.read_text(encoding="utf8"))
    kept = [each for each in sections if _benchmark(each) != command.removesuffix(BESIDE)]
    new = f"## {title}, {date.today()}, {machine()}, `{command}`\n\n{body}\n"
    RESULTS.write_text(head + "".join(f"{each.rstrip()}\n\n" for each in kept) + new, encoding="utf8")


def _benchmark(section: str) -> str:
    """The command behind a table, without the checkout beside it."""
    found = re.search("`(python [^`]+)`", section.partition("\n")[0])
    return found[1].removesuffix(BESIDE) if found else ""
