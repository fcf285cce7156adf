"""`sana-export push`: uploads a bundle to the hub."""

from __future__ import annotations

import argparse
import dataclasses
import logging

from sana_export.cli.terminal.console import VERBOSE, Console
from sana_export.cli.terminal.text import plural, seconds, size, table
from sana_export.cli.verb import Answer, Verb, add_bundle, add_hub_options, hub_options
from sana_export.hub.bundles.card import FILE_NAME as CARD
from sana_export.hub.bundles.card import make_card, private_paths
from sana_export.hub.bundles.push import bundle_files, push_bundle
from sana_export.hub.bundles.source import repository
from sana_export.manifest import FILE_NAME

log = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_bundle(parser)
    parser.add_argument("repo", metavar="REPO", help="hub id (owner/name) or the address of its page; made if there is none")
    parser.add_argument("--revision", metavar="BRANCH", help="branch to push to; made if there is none (default: the main branch)")
    parser.add_argument("--private", action="store_true", help="make a new repository private (default: the account's default)")
    parser.add_argument("--message", metavar="TEXT", help="the commit's message")
    parser.add_argument("--dry-run", action="store_true", help="check the bundle and list what would be pushed; contact nobody")
    add_hub_options(parser)


def run(options: argparse.Namespace, console: Console) -> Answer:
    repo, branch = repository(options.repo, options.revision)
    if options.dry_run:
        return _dry_run(options, repo)
    pushed = push_bundle(
        options.bundle, repo, branch=branch, private=options.private, message=options.message, hub=hub_options(options)
    )
    lines = [
        f"https://huggingface.co/{repo}: {plural(len(pushed.files), 'file')}, {size(pushed.bytes)}, in {seconds(pushed.seconds)}; "
        f"commit {pushed.commit[:12]}",
        *([f"deleted {plural(len(pushed.deleted), 'file')} of the former bundle"] if pushed.deleted else []),
        *([f"{CARD} was kept: somebody wrote it"] if pushed.card_kept else []),
        f"to use it: sana-export generate {repo} 'a red apple' -o apple.png",
    ]
    return Answer(dataclasses.asdict(pushed), "\n".join(lines))


def _dry_run(options: argparse.Namespace, repo: str) -> Answer:
    manifest, entries = bundle_files(options.bundle)
    card, manifest_bytes = make_card(repo, manifest), (options.bundle / FILE_NAME).stat().st_size
    files = {**{entry.path: entry.bytes for entry in entries}, FILE_NAME: manifest_bytes, CARD: len(card.encode())}
    paths = private_paths(manifest)
    document = {
        "repo": repo,
        "files": [{"path": path, "bytes": count} for path, count in files.items()],
        "bytes": sum(files.values()),
        "private_paths": paths,
        "card": card,
    }
    lines = [
        f"{repo} would get {plural(len(files), 'file')}, {size(sum(files.values()))}:",
        table([(path, size(count)) for path, count in files.items()], indent="  "),
        *([f"the manifest names what looks like a path of this machine: {', '.join(paths)}"] if paths else []),
    ]
    return Answer(document, "\n".join(lines))


VERB = Verb(
    name="push",
    summary="upload a bundle to the hub",
    description="Checks a bundle and uploads its files, with a model card, to a repository on the hub in one commit.",
    example="sana-export push bundle someone/sana-1600m-fp16 --dry-run",
    add_arguments=add_arguments,
    run=run,
    level=VERBOSE,
)
