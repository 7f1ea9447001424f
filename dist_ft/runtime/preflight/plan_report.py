"""A plan as text: what `planning.plan` returns, for a person. Pure."""

from __future__ import annotations

from typing import Any

KINDS = (
    "weights",
    "gradients",
    "optimizer",
    "gathered weights",
    "buffers",
    "activations",
    "logits",
)


def as_text(plan: dict[str, Any]) -> str:
    """Return the whole report."""
    model = plan["model"]
    counted = (
        "activations rehearsed with the model's own code"
        if model["rehearsed"]
        else "activations estimated: this model's code can not be rehearsed without values"
    )
    chosen = next(row for row in plan["memory"] if row["chosen"])
    blocks = [
        [
            f"plan of {plan['run']}: {_workers(plan['workers'])}, {_name(chosen)}, {plan['dtype']}; GB are 10^9 bytes"
        ],
        [
            "",
            *_lines(
                [
                    (
                        "model",
                        f"{model['path']} ({model['kind']}), {model['parameters']:,} parameters, "
                        f"{model['learned']:,} learned",
                    ),
                    *plan["batch"].items(),
                ]
            ),
        ],
        ["", f"memory a worker at its peak, GB ({counted})", *_memory(plan)],
        ["", *_lines(_besides(plan, chosen))],
        ["", "on the wire a step (published volumes, as a ring sends them)", *_traffic(plan)],
        ["", *_lines([("checkpoint", _checkpoint(plan))])],
        ["", "GPUs (a tenth of each is left to CUDA, NCCL and fragmentation)", *_gpus(plan)],
    ]
    return "\n".join(line for block in blocks for line in block)


def _workers(count: int) -> str:
    return f"{count} worker{'' if count == 1 else 's'}"


def _name(row: dict[str, Any]) -> str:
    if row["plain"]:
        return "plain PyTorch"
    away = ", ".join(f"{what} on {where}" for what, where in row["offload"].items())
    return f"ZeRO-{row['stage']}" + (f" ({away})" if away else "")


def _gb(size: float) -> str:
    return f"{size / 1e9:,.2f}" if size < 1e11 else f"{size / 1e9:,.0f}"


def _lines(rows: list[tuple[str, str]]) -> list[str]:
    return [f"{name:<16}{text}" for name, text in rows]


def _grid(rows: list[list[str]]) -> list[str]:
    """Return rows as lines, the first column to the left, all others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if place == 0 else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _memory(plan: dict[str, Any]) -> list[str]:
    rows = [["", *KINDS, "total", "peak at"]]
    rows += [
        [
            ("> " if row["chosen"] else "  ") + _name(row),
            *(_gb(row["gpu"][kind]) for kind in KINDS),
            _gb(row["total"]),
            row["when"],
        ]
        for row in plan["memory"]
    ]
    return _grid(rows)


def _besides(plan: dict[str, Any], chosen: dict[str, Any]) -> list[tuple[str, str]]:
    rows = []
    if plan["fewest_workers"] != plan["workers"]:
        rows.append(
            (
                "fewest workers",
                f"{_gb(plan['on_fewest_workers'])} GB a worker on {plan['fewest_workers']}",
            )
        )
    host = {
        **chosen["host"],
        **({"copy for checkpoints": plan["checkpoint_copy"]} if plan["checkpoint_copy"] else {}),
    }
    if host:
        rows.append(
            (
                "host memory",
                f"{_gb(sum(host.values()))} GB a worker = "
                + " + ".join(f"{kind} {_gb(size)}" for kind, size in host.items()),
            )
        )
    return rows


def _traffic(plan: dict[str, Any]) -> list[str]:
    rows = [["", "elements", "of the model", "sent by a worker, GB", "as DeepSpeed does it, GB"]]
    for row in plan["memory"]:
        if not row["plain"]:
            moved = sum(row["elements"].values())
            rows.append(
                [
                    ("> " if row["chosen"] else "  ") + _name(row),
                    f"{moved:,}",
                    f"{moved / plan['model']['parameters']:.3g} x",
                    _gb(row["sent_bytes"]),
                    _gb(row["sent_by_deepspeed_bytes"]),
                ]
            )
    return _grid(rows)


def _checkpoint(plan: dict[str, Any]) -> str:
    sizes = plan["checkpoint"]
    frozen = (
        f", {_gb(sizes['frozen'])} GB frozen once a run"
        if sizes['frozen']
        else ""
    )
    return (
        f"{_gb(sizes['checkpoint'])} GB each ({_gb(sizes[_PART])} GB a worker){frozen}, "
        f"{_gb(plan['kept'] * sizes['checkpoint'])} GB for the newest {plan['kept']}; exported model "
        f"{_gb(sizes['exported_model'])} GB"
    )


_PART = "per_worker"


def _gpus(plan: dict[str, Any]) -> list[str]:
    rows = [["", "GB", f"this run on {plan['workers']}", "fewest as configured", "least cluster"]]
    for gpu in plan["gpus"]:
        least = gpu["least"]
        rows.append(
            [
                f"  {gpu['name']}",
                str(gpu["gb"]),
                f"{'fits' if gpu['fits'] else 'does not fit'}, {gpu['used']:.0%}",
                "none" if gpu["fewest"] is None else str(gpu["fewest"]),
                "none"
                if least is None
                else f"{least['gpus']} GPU{'' if least['gpus'] == 1 else 's'} "
                f"({least['nodes']} node{'' if least['nodes'] == 1 else 's'}), ZeRO-{least['stage']}",
            ]
        )
    return _grid(rows)
