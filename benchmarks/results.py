"""What the benchmarks share: the machine's name, and the place where tables are kept."""

from datetime import date
from pathlib import Path

import torch
from llvmlite.binding import get_host_cpu_name

from batchverify.engine import available_cpus

RESULTS = Path(__file__).parent / "RESULTS.md"


def machine() -> str:
    """The CPU's name, kind and matrix extensions, how many CPUs are in use, the GPU if there is one, and torch."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf8").splitlines()
    facts = dict(each.split(":", 1) for each in lines if ":" in each)
    name = next((value.strip() for key, value in facts.items() if key.strip() == "model name"), "unknown CPU")
    flags = next((value for key, value in facts.items() if key.strip() == "flags"), "").split()
    has = [each for each in ("amx_bf16", "avx512_bf16", "avx512f", "avx2") if each in flags][:1]
    # Kinds of CPU that multiply twice as much as others call themselves by one name.
    has.insert(0, get_host_cpu_name())
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{name} ({', '.join(has)}), {available_cpus()} CPUs{gpu}, torch {torch.__version__}"


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def publish(title: str, command: str, body: str, *, append: bool) -> None:
    """Print a result; with `append`, keep it in RESULTS.md under its title, date, machine and command."""
    print(body)
    if append:
        with RESULTS.open("a", encoding="utf8") as file:
            file.write(f"\n## {title}, {date.today()}, {machine()}, `{command}`\n\n{body}\n")
