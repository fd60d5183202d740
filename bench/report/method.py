"""The last sections of a report: where each file was measured, and how."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ..measure.units import size
from .blocks import Section, Text, row, table
from .cells import Source

METHOD = (
    "Verify, then time: before anything is timed, each contestant's result and gradients are compared with a float64 "
    'oracle on fresh random inputs. "error" is the largest relative distance, "× torch" the largest ratio to plain '
    "PyTorch's own distance at that dtype: up to 2 is right, up to 8 is coarse and said so, beyond is wrong and not "
    "timed.",
    "Contestants alternate in one process, in a new order each round; inputs rotate beyond the L2 cache; medians are "
    'over the rounds, "spread" is the 10th to the 90th percentile over the median. '
    '"time / ours" is taken within a round, its median with a 95 % bootstrap interval: above 1, ours is faster.',
    '"roofline" is the least time that the bytes and FLOPs of the operation allow at the rates measured on that '
    "machine in the same run (a large copy, a large matrix product), over the time taken. A padded contestant pays "
    "for its padding: only real tokens count. Tokens/s counts real tokens, too.",
)


def _environment_rows(source: Source) -> Iterator[tuple[str, str]]:
    where = source.result["environment"]
    yield "measured", where["date"]
    yield "commit", where["commit"] or "unknown"
    yield "sources' sha256", where["source_sha256"][:16]
    yield "processor", f"{where['processor']}, {where['cores']} cores, {where['torch_threads']} PyTorch thread(s)"
    yield "system", f"{where['platform']}, Python {where['python']}"
    versions = where["versions"]
    yield "packages", ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    absent = [name for name, version in versions.items() if not version]
    if absent:
        yield "not installed", ", ".join(absent)
    drift = source.result.get("ceilings_drift")
    if drift:
        after = ", ".join(f"{name} {100 * share:.0f} %" for name, share in drift.items())
        yield "ceilings after the run", f"{after} of those before it"
    gpu = where.get("gpu")
    if gpu is None:
        yield "GPU", "none used"
        return
    yield (
        "GPU",
        (
            f"{gpu['name']}, compute capability {gpu['compute_capability']}, {gpu['multiprocessors']} multiprocessors, "
            f"{size(gpu['memory_bytes'])}, L2 {size(gpu['l2_bytes'])}"
        ),
    )
    yield "CUDA", f"{gpu['cuda']}, cuDNN {gpu['cudnn']}"
    for when, smi in (("before", gpu["nvidia_smi"]), ("after", source.result.get("nvidia_smi_after"))):
        if smi:
            yield f"GPU {when}", ", ".join(f"{name} {value}" for name, value in smi.items() if name != "name")
    clocks = source.result.get("clocks")
    if clocks:
        ranges = {name: values for name, values in clocks.items() if isinstance(values, dict)}
        seen = [f"{name} {x['min']:g} to {x['max']:g}, median {x['median']:g}" for name, x in ranges.items()]
        yield "GPU meanwhile", f"{'; '.join(seen)}; held down in {100 * clocks['throttled']:.0f} % of the samples"


def environment_section(sources: Sequence[Source]) -> Section:
    """Everything known about where each file was measured."""
    files = []
    for source in sources:
        if "environment" in source.result:
            rows = [row(pair) for pair in _environment_rows(source)]
            files.append(Section(source.path.name, (table(("", ""), rows, left=2),), folded=True))
    return Section("Environment", tuple(files))


def method_section() -> Section:
    """How the figures were taken."""
    return Section("Method", tuple(Text(paragraph) for paragraph in METHOD))


__all__ = [
    "environment_section",
    "method_section",
]
