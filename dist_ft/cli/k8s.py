"""The commands `dist-ft k8s render | check`; `cli` hangs them in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import typer

from dist_ft.cli.data import Config, Overrides

HELP = (
    "Manifests for Kubernetes: made from a run's config, and checked without a cluster.\n\n\b\nFirst steps:\n"
    "  dist-ft k8s render configs/llama-8b.yaml --out mine/   what the run takes, as manifests\n"
    "  dist-ft k8s check mine/ --crd crd.yaml                 would Kubernetes and KubeRay take them?\n"
    "  kubectl apply -k mine/                                 begin"
)


def commands(register: Callable[..., Any]) -> None:
    """Hand every command to `register`."""
    for command in (render, check):
        register(command)


def render(
    config: Config,
    overrides: Overrides = None,
    out: Annotated[str | None, typer.Option(help="Folder to write; none: all on stdout.")] = None,
    kustomize: Annotated[
        str | None,
        typer.Option(
            metavar="DIR", help=("Write base, components and overlays for kustomize there instead.")
        ),
    ] = None,
    overlay: Annotated[str, typer.Option(help="development, production or production-spot.")] = "",
    component: Annotated[
        list[str] | None,
        typer.Option(
            "--with",
            metavar="COMPONENT",
            help=(
                "kueue, spot, efa, rdma, s3-service-account, gcs-fault-tolerance; may be given several times."
            ),
        ),
    ] = None,
    image: Annotated[
        str | None, typer.Option(help="With tag or digest; none: dist-ft:<this version>.")
    ] = None,
    namespace: Annotated[str | None, typer.Option(help="None: dist-ft.")] = None,
    workers_per_node: Annotated[
        int | None,
        typer.Option(min=1, help="Its GPUs; cluster.workers_per_node goes before it; none: 8."),
    ] = None,
    parameters: Annotated[
        float | None,
        typer.Option(
            help=(
                "Of the model, such as 8.03e9; none: counted from --model-config or the folder at model.path; else as "
                "its name says, and a tenth more."
            )
        ),
    ] = None,
    model_config: Annotated[
        str | None, typer.Option("--model-config", help="A config.json to count.")
    ] = None,
    node_selector: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUE",
            help=(
                "Label of the workers' nodes, such as nvidia.com/gpu.product=NVIDIA-H100-80GB-HBM3."
            ),
        ),
    ] = None,
    more: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="NAME=VALUE",
            help=(
                "Any other option, such as claim=shared or storage_mb_s=500; see docs/kubernetes.md."
            ),
        ),
    ] = None,
) -> None:
    """Write the manifests of a run: pods, GPUs, memory, /dev/shm, grace periods and labels follow from its config.

    An elastic range begins with its fewest pods and takes more as they come. The sums are written out beside them.

    \b
    Examples:
      dist-ft k8s render configs/llama-8b.yaml --out mine/ --overlay production --set s3_role=arn:aws:iam::1:role/mine
      dist-ft k8s render configs/llama-70b.yaml cluster.workers=64 --image registry/dist-ft:0.1.0 --with spot \\
        --model-config configs/architectures/llama-3.1-70b.json

    Next: dist-ft k8s check DIR --crd FILE
    """
    from dist_ft.cluster.k8s import render as rendering
    from dist_ft.cluster.k8s.options import parse
    from dist_ft.cluster.k8s.sizing import described, sizing
    from dist_ft.config.load import load_config
    from dist_ft.core.errors import ConfigError
    from dist_ft.runtime.preflight.run_plan import count_parameters

    if kustomize and (out or overlay or component):
        raise ConfigError(
            [
                f"--kustomize={kustomize}: writes all overlays and components; alone, or --out, --overlay "
                "and --with; leave one out"
            ],
            "k8s render",
        )
    given = {
        "image": image,
        "namespace": namespace,
        "workers_per_node": workers_per_node,
        "parameters": parameters,
        "node_selector": tuple(node_selector) if node_selector else None,
    }
    options, run = parse(given, more or ()), load_config(config, overrides or ())
    if not options.parameters:
        options = options.model_copy(
            update={"parameters": count_parameters(run, model_config) or 0}
        )
    if kustomize:
        texts = rendering.tree(run, options)
    else:
        files = rendering.rendered(run, options, overlay, component or ())
        texts = rendering.folder(files)
    folder = kustomize or out
    for name, arithmetic in described(sizing(run, options)):
        typer.echo(f"{name:<12}{arithmetic}", err=not folder)
    if folder:
        rendering.write(texts, folder)
        typer.echo(
            f"wrote {len(texts)} files below {folder}; next: dist-ft k8s check {folder}"
            + ("/overlays/production" if kustomize else "")
        )
    else:
        typer.echo(
            rendering.as_yaml([document for file in files.values() for document in file]), nl=False
        )


def check(
    paths: Annotated[
        list[str],
        typer.Argument(
            metavar="PATH...",
            help=("Files, folders, folders for kustomize (which need kubectl or kustomize)."),
        ),
    ],
    crd: Annotated[
        str | None,
        typer.Option(
            metavar="PATH",
            help=("CRDs of RayJob and RayCluster, or their schemas: a file or folder."),
        ),
    ] = None,
    kubernetes: Annotated[
        str, typer.Option(metavar="VERSION", help="Such as 1.33; none: the newest known.")
    ] = "",
) -> None:
    """Say everything that is wrong with manifests, without a cluster; exits 2 then.

    Kubernetes' own kinds strictly against its schemas; RayJob and RayCluster against their CRD and its rules; what the
    KubeRay operator refuses; and our production checklist. The CRDs are those of your cluster:
    kubectl get crd rayjobs.ray.io rayclusters.ray.io -o yaml > crd.yaml

    \b
    Examples:
      dist-ft k8s check mine/ --crd crd.yaml
      dist-ft k8s check rayjob.yaml policies.yaml --kubernetes 1.33

    Next: kubectl apply -k DIR
    """
    from dist_ft.cluster.k8s import check as checking
    from dist_ft.core.errors import ConfigError

    report = checking.check(paths, crd, kubernetes)
    for note in report.notes:
        typer.echo(f"note: {note}", err=True)
    if report.problems:
        raise ConfigError(report.problems, "k8s check")
    typer.echo(f"{report.checked} objects: ok")
