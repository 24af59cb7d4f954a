"""The tables of docs/pods.md, from the results of `benchmarks.aot`."""

import json
import pathlib

from benchmarks import results

RESULTS = pathlib.Path(__file__).parent / "results"
BEFORE = "_before"  # ends the names of results that a later version is compared with


def write(path):
    """Writes the tables of all results between the two marks of a Markdown file."""
    results.insert(path, "aot", tables(list(committed().values())))


def committed():
    """Returns {file name: result} of the repository, without those of earlier versions."""
    files = [file for file in sorted(RESULTS.glob("aot_*.json")) if not file.stem.endswith(BEFORE)]
    return {file.name: json.loads(file.read_text(encoding="utf-8")) for file in files}


def tables(found):
    """Returns the Markdown of results (dictionaries, as `benchmarks.aot` writes them)."""
    trained = [x for x in found if "train" in x]
    parts = [
        _section("One training step, compiled", _STEP, [_step(x) for x in trained]),
        _section(
            "What the chips exchange in a step",
            _EXCHANGE,
            [row for x in trained for row in _exchange(x)],
        ),
        *(
            _section(
                f"Weak scaling on {x['topology'].partition(':')[0]}: predicted from the plan, "
                f"not compiled; products as in {x['topology']}",
                _SCALING,
                map(_scaling, x["train"]["scaling"]),
            )
            for x in trained
        ),
        _section(
            "The deployed policy on one chip, compiled",
            _POLICY,
            [_policy(x, x[job]) for x in found for job in x if job.startswith("policy_")],
        ),
        _section(
            "What one GPU launches, compiled; time estimated from that, not measured",
            _LAUNCHES,
            [
                _launches(x, job, x[job])
                for x in found
                for job in x
                if isinstance(x[job], dict) and "launches" in x[job]
            ],
        ),
    ]
    notes = [
        f"\n{x['topology']}, step: {x['train']['note']}\n" for x in trained if "note" in x["train"]
    ]
    return "\n".join(part for part in [*parts, *notes] if part)


_STEP = (
    "topology",
    "batch",
    "data x fsdp",
    "accumulation",
    "remat",
    "compile s",
    "GiB per chip",
    "of them arguments",
    "TFLOP per chip",
    "roofline ms",
    "samples/s",
    "MFU %",
    "full remat. warnings",
    "unplanned",
)
_EXCHANGE = ("topology", "kind", "arrays per step", "GiB", "overlapped %", "planned GiB")
_SCALING = (
    "chips",
    "batch",
    "data x fsdp",
    "GiB per chip, without activations",
    "compute ms",
    "communication ms",
    "roofline ms",
    "samples/s",
)
_POLICY = ("topology", "batch", "compile s", "GiB", "TFLOP", "floor ms (roofline)")
_LAUNCHES = (
    "topology",
    "program",
    "batch",
    "launches",
    "of them products",
    "GiB moved by products",
    "by the rest",
    "floor ms (roofline)",
    "estimate ms",
)


def _section(title, header, rows):
    rows = [[str(cell) for cell in row] for row in rows]
    if not rows:
        return ""
    lines = [header, ["---"] * len(header), *rows]
    return f"\n**{title}**\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _step(x):
    t = x["train"]
    memory, limits = t["memory_gib_per_chip"], t["roofline"]
    return (
        x["topology"],
        t["batch_size"],
        _mesh(t),
        t["accum_steps"],
        t["remat"],
        f"{t['compile_s']:.0f}",
        f"{memory['peak']:.2f}",
        f"{memory['arguments']:.2f}",
        f"{t['tflop_per_chip']:.0f}",
        _range(limits["step_ms"]),
        _range(limits["samples_per_s"]),
        _range([100 * m for m in limits["mfu"]]),
        t["complaints"]["involuntary_full_rematerialization"],
        len(t["plan"]["unplanned"]),
    )


def _exchange(x):
    t = x["train"]
    plan = t.get("planned", t["collectives"])  # where what is written is what is counted
    for kind in dict.fromkeys([*t["collectives"], *plan]):
        got = t["collectives"].get(kind, {"count": 0, "gib": 0, "overlapped": 0})
        yield (
            x["topology"],
            kind,
            got["count"],
            f"{got['gib']:.2f}",
            f"{100 * got['overlapped']:.0f}",
            f"{plan.get(kind, {'gib': 0})['gib']:.2f}",
        )


def _scaling(row):
    return (
        row["chips"],
        row["batch_size"],
        _mesh(row),
        f"{row['memory_plan_gib']:.2f}",
        f"{1000 * row['compute_s']:.0f}",
        f"{1000 * row['communication_s']:.0f}",
        _range(row["step_ms"]),
        _range(row["samples_per_s"]),
    )


def _policy(x, p):
    return (
        x["topology"].partition(":")[0],
        p["batch"],
        f"{p['compile_s']:.0f}",
        f"{p['memory_gib_per_chip']['peak']:.2f}",
        f"{p['tflop_per_chip']:.2f}",
        f"{p['floor_ms']:.1f}",
    )


def _launches(x, job, p):
    return (
        x["topology"],
        job.partition("_")[0],
        p.get("batch", p.get("batch_size")),
        p["launches"],
        p["gemm_launches"],
        f"{p['gemm_gib']:.2f}",
        f"{p['other_gib']:.2f}",
        f"{p['floor_ms']:.1f}",
        f"{p['estimate_ms']:.1f}",
    )


def _mesh(x):
    return f"{x['mesh']['data']} x {x['mesh']['fsdp']}"


def _range(pair):
    low, high = sorted(pair)
    return f"{low:.0f} to {high:.0f}" if f"{low:.0f}" != f"{high:.0f}" else f"{low:.0f}"
