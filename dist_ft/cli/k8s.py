"""The commands `dist-ft k8s render | check`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import typer

from dist_ft.cli import output
from dist_ft.cli.arguments import Config, Overrides

HELP = (
    "Kubernetes manifests: rendered from a run's config, and checked without a cluster.\n\n"
    "\b\nFirst steps:\n"
    "  dist-ft k8s render configs/llama-8b.yaml --out mine/   write the manifests of a run\n"
    "  dist-ft k8s check mine/ --crd crd.yaml                 validate them\n"
    "  kubectl apply -k mine/                                 start the run"
)


def commands(register: Callable[..., Any]) -> None:
    """Pass every command to `register`."""
    for command in (render, check):
        register(command)


def render(
    config: Config,
    overrides: Overrides = None,
    out: Annotated[str | None, typer.Option(help="Folder to write. Default: stdout.")] = None,
    kustomize: Annotated[
        str | None,
        typer.Option(
            metavar="DIR", help="Write base, components and overlays for kustomize here instead."
        ),
    ] = None,
    overlay: Annotated[str, typer.Option(help="development, production or production-spot.")] = "",
    component: Annotated[
        list[str] | None,
        typer.Option(
            "--with",
            metavar="COMPONENT",
            help="kueue, spot, efa, rdma, s3-service-account or gcs-fault-tolerance. Repeatable.",
        ),
    ] = None,
    image: Annotated[
        str | None,
        typer.Option(help="Image with tag or digest. Default: dist-ft:<this version>."),
    ] = None,
    namespace: Annotated[str | None, typer.Option(help="Namespace. Default: dist-ft.")] = None,
    workers_per_node: Annotated[
        int | None,
        typer.Option(
            min=1, help="GPUs of a node. cluster.workers_per_node takes precedence. Default: 8."
        ),
    ] = None,
    parameters: Annotated[
        float | None,
        typer.Option(
            help="Parameters of the model, such as 8.03e9. Default: counted from --model-config or "
            "the folder at model.path, else taken from the model's name plus 10 %."
        ),
    ] = None,
    model_config: Annotated[
        str | None, typer.Option("--model-config", help="A config.json to count parameters from.")
    ] = None,
    node_selector: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUE",
            help="Label of the workers' nodes, such as "
            "nvidia.com/gpu.product=NVIDIA-H100-80GB-HBM3. Repeatable.",
        ),
    ] = None,
    more: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="NAME=VALUE",
            help="Any other option, such as claim=shared or storage_mb_s=500; see "
            "docs/kubernetes.md. Repeatable.",
        ),
    ] = None,
) -> None:
    """Write the manifests of a run: pods, GPUs, memory, /dev/shm, grace periods, labels.

    All sizes follow from the config; the arithmetic is printed. An elastic range starts with its
    fewest pods and grows as more become available.

    \b
    Examples:
      dist-ft k8s render configs/llama-8b.yaml --out mine/ --overlay production
      dist-ft k8s render configs/llama-70b.yaml cluster.workers=64 --with spot \\
        --model-config configs/architectures/llama-3.1-70b.json

    Next: dist-ft k8s check DIR --crd FILE
    """
    from dist_ft.cluster.k8s import render as rendering
    from dist_ft.cluster.k8s.options import parse_options
    from dist_ft.cluster.k8s.sizing import compute_sizing, describe_sizing
    from dist_ft.config.load import load_config
    from dist_ft.core.errors import ConfigError
    from dist_ft.runtime.preflight.model_trace import count_parameters

    if kustomize and (out or overlay or component):
        raise ConfigError(
            [
                f"--kustomize={kustomize}: writes all overlays and components, so it cannot be "
                "combined with --out, --overlay or --with. Use one or the other."
            ],
            "k8s render",
        )

    # None: not given, so that the option's default applies.
    given = {
        "image": image,
        "namespace": namespace,
        "workers_per_node": workers_per_node,
        "parameters": parameters,
        "node_selector": tuple(node_selector) if node_selector else None,
    }
    options = parse_options(given, more or ())
    run = load_config(config, overrides or ())

    # Memory follows from the number of parameters. With 0, if they cannot be counted here, sizing
    # takes the number from the model's name.
    if not options.parameters:
        counted = count_parameters(run, model_config) or 0
        options = options.model_copy(update={"parameters": counted})

    if kustomize:
        texts = rendering.render_tree(run, options)
    else:
        files = rendering.render_objects(run, options, overlay, component or ())
        texts = rendering.render_folder(files)

    # On stdout next to files, on stderr if stdout holds the manifests.
    folder = kustomize or out
    for name, arithmetic in describe_sizing(compute_sizing(run, options)):
        output.echo(f"{name:<12}{arithmetic}", err=not folder)

    # One stream for `kubectl apply -f -`.
    if not folder:
        documents = [document for file in files.values() for document in file]
        output.echo_yaml(rendering.to_yaml(documents))
        return

    rendering.write_files(texts, folder)

    # With kustomize, an overlay is what is checked and applied.
    overlay_folder = "/overlays/production" if kustomize else ""
    output.echo(
        f"wrote {len(texts)} files below {folder}; next: dist-ft k8s check {folder}{overlay_folder}"
    )


def check(
    paths: Annotated[
        list[str],
        typer.Argument(
            metavar="PATH...",
            help="Files, folders, or folders for kustomize (which need kubectl or kustomize).",
        ),
    ],
    crd: Annotated[
        str | None,
        typer.Option(
            metavar="PATH",
            help="CRDs of RayJob and RayCluster, or their schemas: a file or folder.",
        ),
    ] = None,
    kubernetes: Annotated[
        str,
        typer.Option(metavar="VERSION", help="Such as 1.33. Default: the latest known version."),
    ] = "",
) -> None:
    """Report everything that is wrong with manifests, without a cluster. Exits 2 if there is any.

    Checks core kinds strictly against the schemas of Kubernetes, RayJob and RayCluster against
    their CRD and its rules, the rules of the KubeRay operator, and our production checklist. Get
    the CRDs of your cluster with:
    kubectl get crd rayjobs.ray.io rayclusters.ray.io -o yaml > crd.yaml

    \b
    Examples:
      dist-ft k8s check mine/ --crd crd.yaml
      dist-ft k8s check rayjob.yaml policies.yaml --kubernetes 1.33

    Next: kubectl apply -k DIR
    """
    from dist_ft.cluster.k8s import check as checking
    from dist_ft.core.errors import ConfigError

    # Notes say what could not be checked (a kind without a schema). They are no problems.
    report = checking.check(paths, crd, kubernetes)
    for note in report.notes:
        output.echo(f"note: {note}", err=True)

    if report.problems:
        raise ConfigError(report.problems, "k8s check")

    output.echo(f"{report.checked} objects: ok")
