"""What `benchmarks.paper_table` prints: its numbers as a table, the published ones beside them."""

import json

COLUMNS = {
    "light_wam": "Light-WAM 1.3B",
    "published_light_wam": "published: Light-WAM",
    "flow_dit_frozen": "flow_dit 1.3B, backbone frozen",
    "flow_dit": "flow_dit 1.3B",
    "flow_dit_5b": "flow_dit 5B",
    "published_fast_wam": "published: Fast-WAM 5B",
}
# As their authors give them, on their machines. What they do not give is not here.
PUBLISHED = {
    "published_light_wam": {
        "source": "arXiv 2606.08242",
        "parameters": "1,986.82 M",
        "trained": "441.03 M",
        "head": "351.03 M",
        "acting": "4.1 GiB",
        "training": "43.1 GiB",
        "latency": "72.03 ms (RTX 4090)",
        "libero": "97.2 %",
    },
    "published_fast_wam": {
        "source": "the paper's abstract and project page; latency: issue 14 of its repository",
        "latency": "190 ms (RTX 5090D V2)",
        "libero": "97.6 %",
    },
}
_ABSENT, _COMPILED = "not published", ("acting", "launches", "floor", "estimate")


def table(rows, measured=None):
    """Returns the lines of a Markdown table.

    Args:
      rows: {row of `paper_table.ROWS`: its numbers}. measured: of `measured`.
    """
    cells = {
        name: _cells(numbers) | (measured or {}).get(name, {}) for name, numbers in rows.items()
    }
    cells |= PUBLISHED
    columns = [name for name in COLUMNS if name in cells]
    lines = [("", *(COLUMNS[name] for name in columns)), ("---",) * (1 + len(columns))]
    for key, label in _LINES.items():
        missing = "not compiled" if key in _COMPILED else "not measured"
        absent = {name: _ABSENT if name in PUBLISHED else missing for name in columns}
        lines.append((label, *(cells[name].get(key, absent[name]) for name in columns)))
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


_LINES = {
    "parameters": "parameters, VAE included",
    "trained": "of them trained",
    "head": "of them the action head",
    "plan": "TFLOP per plan, VAE apart",
    "vae": "TFLOP of the VAE",
    "sample": "TFLOP per training sample",
    "weights": "weights when acting, bfloat16",
    "acting": "memory when acting, batch 1",
    "training": "memory of a training step, 16 samples",
    "launches": "launches of a plan",
    "floor": "least time of a plan's products, H100",
    "estimate": "time of a plan estimated from its launches, H100",
    "latency": "latency of a plan, GPU",
    "cpu": "CPU time beside the PyTorch reference",
    "libero": "LIBERO, mean of four suites",
}


def _cells(numbers):
    """{key of `_LINES`: text} of a row's numbers."""
    counts, tflop = numbers["parameters"], numbers["tflop"]
    million = lambda count: f"{count / 1e6:,.2f} M"
    plans = tflop["plan"]
    most = str(max(map(int, plans)))
    several = f" ({plans['1']:.3f} with 1 step)" if len(plans) > 1 else ""
    found = {
        "parameters": million(counts["total"]),
        "trained": million(counts["trained"]),
        "head": million(counts["action_expert"]),
        "plan": f"{plans[most]:.3f}{several}",
        "vae": f"{tflop['vae']:.3f}",
        "sample": f"{tflop['training_sample']:.2f}",
        "weights": f"{numbers['acting_gib']:.2f} GiB",
        "training": f"{sum(numbers['plan_gib'].values()):.1f} GiB planned",
    }
    if policy := numbers.get("compiled", {}).get("policy"):
        found["acting"] = f"{policy['memory_gib_per_chip']['peak']:.2f} GiB compiled"
        found["launches"] = f"{policy['launches']:,}"
        found["floor"] = f"{policy['floor_ms']:.1f} ms"
        found["estimate"] = f"{policy['estimate_ms']:.1f} ms"
    if step := numbers.get("compiled", {}).get("train"):
        found["training"] = (
            f"{step['memory_gib_per_chip']['peak']:.1f} GiB compiled, "
            f"{sum(numbers['plan_gib'].values()):.1f} planned"
        )
    return found


def measured(folder):
    """Returns {row: {key of `_LINES`: text}} of what the results in `folder` measured of a row."""
    path = folder / "against_reference.json"
    if not path.exists():
        return {}
    found = json.loads(path.read_text(encoding="utf-8"))
    ratios = {row["case"]: row["ratio"] for row in found["rows"] if row["dtype"] == "float32"}
    if "inference_1" not in ratios:
        return {}
    return {"light_wam": {"cpu": f"{ratios['inference_1']:.2f} (float32, batch 1)"}}
