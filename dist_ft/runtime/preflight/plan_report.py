"""A plan (`run_plan.plan`) as text for a person. Pure."""

from __future__ import annotations

from dist_ft.runtime.preflight.run_plan import Plan, PlannedMemory, SmallestCluster

MEMORY_KINDS = (
    "weights",
    "gradients",
    "optimizer",
    "gathered weights",
    "buffers",
    "activations",
    "logits",
)


def as_text(plan: Plan) -> str:
    """Return the whole report."""
    model = plan["model"]
    source = "activations estimated: this model's code cannot be traced without values"
    if model["traced"]:
        source = "activations traced with the model's own code"

    chosen = next(row for row in plan["memory"] if row["chosen"])
    model_line = (
        f"{model['path']} ({model['kind']}), {model['parameters']:,} parameters, "
        f"{model['trainable']:,} trainable"
    )

    lines = [
        f"plan of {plan['run']}: {_count(plan['workers'], 'worker')}, {_name(chosen)}, "
        f"{plan['dtype']}; GB are 10^9 bytes",
        "",
        *_pairs([("model", model_line), *plan["batch"].items()]),
        "",
        f"memory of a worker at its peak, GB ({source})",
        *_memory_table(plan),
        "",
        *_pairs(_further_memory(plan, chosen)),
        "",
        "sent in a step (published volumes, as a ring sends them)",
        *_traffic_table(plan),
        "",
        *_pairs([("checkpoint", _checkpoint_line(plan))]),
        *_pairs([("limits", line) for line in plan["limits"]]),
        "",
        "GPUs (a tenth of each is left to CUDA, NCCL and fragmentation)",
        *_gpu_table(plan),
    ]

    return "\n".join(lines)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _name(row: PlannedMemory) -> str:
    if row["plain"]:
        return "plain PyTorch"

    name = f"ZeRO-{row['stage']}"
    if row["offload"]:
        offload = ", ".join(f"{what} on {where}" for what, where in row["offload"].items())
        name += f" ({offload})"
    return name


def _marked_name(row: PlannedMemory) -> str:
    # Both marks have the same width, so that the names stay aligned.
    mark = "> " if row["chosen"] else "  "
    return mark + _name(row)


def _gb(size: float) -> str:
    if size < 1e11:
        return f"{size / 1e9:,.2f}"
    return f"{size / 1e9:,.0f}"


def _pairs(rows: list[tuple[str, str]]) -> list[str]:
    return [f"{name:<16}{text}" for name, text in rows]


def _table(rows: list[list[str]]) -> list[str]:
    """Return rows as lines, the first column aligned left, all others right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]

    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0])]
        for cell, width in zip(row[1:], widths[1:], strict=True):
            cells.append(cell.rjust(width))
        lines.append("  ".join(cells).rstrip())

    return lines


def _memory_table(plan: Plan) -> list[str]:
    rows = [["", *MEMORY_KINDS, "total", "peak at"]]
    for row in plan["memory"]:
        sizes = [_gb(row["gpu"][kind]) for kind in MEMORY_KINDS]
        rows.append([_marked_name(row), *sizes, _gb(row["total"]), row["when"]])

    return _table(rows)


def _further_memory(plan: Plan, chosen: PlannedMemory) -> list[tuple[str, str]]:
    """Return the lines on the fewest workers and on host memory, as far as there are any."""
    rows = []

    # An elastic run must also fit on its fewest workers, where each holds most.
    if plan["fewest_workers"] != plan["workers"]:
        size = _gb(plan["on_fewest_workers"])
        rows.append(("fewest workers", f"{size} GB a worker on {plan['fewest_workers']}"))

    host = dict(chosen["host"])
    if plan["checkpoint_copy"]:
        host["copy for checkpoints"] = plan["checkpoint_copy"]
    if host:
        terms = " + ".join(f"{kind} {_gb(size)}" for kind, size in host.items())
        total = _gb(sum(host.values()))
        rows.append(("host memory", f"{total} GB a worker = {terms}"))

    return rows


def _traffic_table(plan: Plan) -> list[str]:
    rows = [["", "elements", "of the model", "sent by a worker, GB", "as DeepSpeed does it, GB"]]
    for row in plan["memory"]:
        # One process has nobody to send to.
        if row["plain"]:
            continue

        num_elements = sum(row["elements"].values())
        rows.append(
            [
                _marked_name(row),
                f"{num_elements:,}",
                f"{num_elements / plan['model']['parameters']:.3g} x",
                _gb(row["sent_bytes"]),
                _gb(row["sent_by_deepspeed_bytes"]),
            ]
        )

    return _table(rows)


def _checkpoint_line(plan: Plan) -> str:
    sizes, keep_last = plan["checkpoint"], plan["keep_last"]
    line = f"{_gb(sizes['checkpoint'])} GB each ({_gb(sizes['per_worker'])} GB a worker)"
    if sizes["frozen"]:
        line += f", {_gb(sizes['frozen'])} GB frozen once a run"

    kept = _gb(keep_last * sizes["checkpoint"])
    exported = _gb(sizes["exported_model"])
    return f"{line}, {kept} GB for the latest {keep_last}; exported model {exported} GB"


def _gpu_table(plan: Plan) -> list[str]:
    configured = f"this run on {plan['workers']}"
    rows = [["", "GB", configured, "fewest as configured", "smallest cluster"]]
    for gpu in plan["gpus"]:
        verdict = "fits" if gpu["fits"] else "does not fit"
        fewest = "none" if gpu["fewest"] is None else str(gpu["fewest"])
        rows.append(
            [
                f"  {gpu['name']}",
                str(gpu["gb"]),
                f"{verdict}, {gpu['used']:.0%}",
                fewest,
                _cluster(gpu["least"]),
            ]
        )

    return _table(rows)


def _cluster(cluster: SmallestCluster | None) -> str:
    if cluster is None:
        return "none"
    size = f"{_count(cluster['gpus'], 'GPU')} ({_count(cluster['nodes'], 'node')})"
    return f"{size}, ZeRO-{cluster['stage']}"
