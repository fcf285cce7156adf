"""`sana-export pull`: downloads a bundle from the hub."""

from __future__ import annotations

import argparse

from sana_export.cli.bundle_text import bundle_document, bundle_summary
from sana_export.cli.terminal.console import VERBOSE, Console
from sana_export.cli.terminal.text import plural, seconds, size
from sana_export.cli.verb import Answer, Verb, add_hub_options, hub_options, path_named
from sana_export.hub.bundles.fetch import pull_bundle
from sana_export.hub.bundles.source import repository


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("repo", metavar="REPO", help="hub id (owner/name, owner/name@revision) or the address of its page")
    parser.add_argument(
        "-o",
        "--output",
        metavar="DIR",
        type=path_named("--output"),
        help="folder of the bundle, written whole or not at all; one with the same bundle gets what it lacks (default: the hub's "
        "cache, from where other commands load it by its hub id)",
    )
    parser.add_argument("--revision", metavar="R", help="branch, tag or commit (default: the main branch)")
    parser.add_argument(
        "--all-engines", action="store_true", help="download the engines of other machines too (default: those that run here)"
    )
    add_hub_options(parser)


def run(options: argparse.Namespace, console: Console) -> Answer:
    repo, revision = repository(options.repo, options.revision)
    pulled = pull_bundle(repo, options.output, revision=revision, hub=hub_options(options), all_engines=options.all_engines)
    document = {
        **bundle_document(pulled.folder, pulled.manifest),
        "repo": repo,
        "commit": pulled.origin.commit,
        "downloaded": {"files": len(pulled.downloaded), "bytes": pulled.bytes},
        "engines_left": [entry.file.path for entry in pulled.left],
        "seconds": pulled.seconds,
    }
    lines = [
        bundle_summary(pulled.folder, pulled.manifest),
        f"downloaded {plural(len(pulled.downloaded), 'file')}, {size(pulled.bytes)}, in {seconds(pulled.seconds)}; "
        f"{repo} at {pulled.origin.commit[:12]}; every file matches the manifest",
    ]
    if pulled.left:
        lines.append(f"{plural(len(pulled.left), 'engine')} for other machines not downloaded (--all-engines takes them)")
    return Answer(document, "\n".join(lines))


VERB = Verb(
    name="pull",
    summary="download a bundle from the hub",
    description="Downloads a bundle from the hub, with the engines that this machine can run, and checks every file.",
    example="sana-export pull someone/sana-1600m-fp16 -o bundle",
    add_arguments=add_arguments,
    run=run,
    level=VERBOSE,
)
