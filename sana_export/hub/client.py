"""How huggingface_hub is used: settings, what a repository contains, single downloads, and its errors as ours."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sana_export.errors import DependencyError, SanaExportError, UsageError, first_line
from sana_export.files import disk_errors, is_disk_error
from sana_export.installation import install_command
from sana_export.user_paths import user_path

#: Where the names of published checkpoints are.
LIST_VARIANTS = "sana-export variants  (lists the published checkpoints)"
#: The branch of a repository that is used if none is named.
MAIN = "main"


@dataclass(frozen=True)
class Hub:
    """How the hub is used."""

    #: The access token. None: the one of `hf auth login` or HF_TOKEN, if any.
    token: str | None = field(default=None, repr=False)
    #: The folder of downloaded files. None: huggingface_hub's default.
    cache_dir: Path | None = None
    #: Use only files that are in the cache.
    offline: bool = False


@dataclass(frozen=True)
class RepositoryFile:
    """What the hub says about a file."""

    #: Its size. None: unknown.
    bytes: int | None
    #: The sha256 of its content. None for a small file in git itself, for which the hub knows none.
    sha256: str | None = None


@dataclass(frozen=True)
class Repository:
    """A repository at one commit."""

    #: The commit's hash.
    commit: str
    #: Its files by path.
    files: Mapping[str, RepositoryFile]


def is_offline(hub: Hub, what: str = "the hub") -> bool:
    """Whether the hub must not be contacted: by `hub`, or by HF_HUB_OFFLINE.

    Raises DependencyError, with `what` as its subject, if huggingface_hub is not installed.
    """
    try:
        import huggingface_hub.constants
    except ModuleNotFoundError as error:
        raise DependencyError(
            f"{what} needs a package that is not installed", found=error, wanted="huggingface_hub", fix=install_command("hub")
        ) from error

    return hub.offline or bool(huggingface_hub.constants.HF_HUB_OFFLINE)


def cache_of(hub: Hub) -> Path:
    """The folder of downloaded files. Raises DependencyError if there is no home folder."""
    import huggingface_hub.constants

    # huggingface_hub leaves the `~` of its default in place if there is no home folder.
    return user_path(hub.cache_dir or huggingface_hub.constants.HF_HUB_CACHE, "the hub's cache folder", home="HF_HOME")


def look_up(repo: str, revision: str | None, hub: Hub, *, names: str = LIST_VARIANTS) -> Repository:
    """What `repo` contains at `revision` (None: its main branch). `names`: where to find names of repositories, for an error.

    Raises UsageError for an unknown repository or revision, and DependencyError if the hub cannot be reached or refuses.
    """
    offline = is_offline(hub)
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    with hub_errors(repo, revision, offline, (), names=names):
        try:
            found = huggingface_hub.HfApi().model_info(repo, revision=revision, files_metadata=True, token=hub.token)
            files = {
                file.rfilename: RepositoryFile(file.size, file.lfs["sha256"] if file.lfs else None) for file in found.siblings or ()
            }
            if not found.sha:
                raise ValueError("no commit")
        except (HFValidationError, HfHubHTTPError):  # some of them are ValueErrors too
            raise
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DependencyError(
                f"the server's answer about {repo} is not a hub's",
                found=first_line(error),
                wanted="a Hugging Face hub, or a mirror of it",
                fix="check the network's login page and HF_ENDPOINT",
            ) from error
    return Repository(found.sha, files)


def download(
    repo: str,
    name: str,
    revision: str | None,
    hub: Hub,
    *,
    folder: Path | None = None,
    anew: bool = False,
    names: str = LIST_VARIANTS,
) -> Path:
    """Download the file `name` of `repo`, unless it is here already, and return its path.

    folder: where it goes. None: huggingface_hub's cache.
    anew: download it even if it is here.
    names: where to find names of repositories, for an error.

    Raises the errors of `look_up`.
    """
    offline = is_offline(hub)
    import huggingface_hub

    with (
        disk_errors((folder or cache_of(hub) / repo) / name),
        hub_errors(repo, revision, offline, (name,), names=names, transfer=True),
    ):
        return Path(
            huggingface_hub.hf_hub_download(
                repo,
                name,
                revision=revision,
                cache_dir=hub.cache_dir,
                local_dir=folder,
                token=hub.token,
                local_files_only=offline,
                force_download=anew,
            )
        )


@dataclass(frozen=True)
class _Refusal:
    """The error to raise for one of huggingface_hub's. Its texts may contain {repo}, {revision}, {first} and {names}."""

    #: Its class.
    kind: type[SanaExportError]
    #: Its message.
    message: str
    #: What was wanted.
    wanted: str
    #: How to fix it.
    fix: str
    #: What was found. None: the text of huggingface_hub's error.
    found: str | None = None


_OFFLINE = _Refusal(
    DependencyError,
    "{repo} is not in the cache, and offline mode is on",
    "a cached copy of {first} at this revision",
    "run the same command once without --offline (and without HF_HUB_OFFLINE), or pass the --cache-dir that contains it",
    found="no such file in the cache",
)
_UNREACHABLE = _Refusal(
    DependencyError,
    "the hub cannot be reached for {repo}",
    "a connection to the hub",
    "check the network and HF_ENDPOINT, add --offline if it is cached, or use a local folder",
)
_BROKEN_OFF = _Refusal(
    DependencyError,
    "the connection to the hub broke off during a transfer of {repo}",
    "the whole file",
    "run the same command again: files that are complete are not transferred again",
)
_NOT_POSSIBLE = _Refusal(
    DependencyError,
    "huggingface_hub cannot transfer the files of {repo}",
    "files that it can transfer, and room for them in the account",
    "pip install hf_xet  (for files of more than 50 GB), or see what was found",
)
#: By the name of huggingface_hub's or its HTTP client's class, subclasses first.
_REFUSALS = {
    "GatedRepoError": _Refusal(
        DependencyError,
        "{repo} is gated: only accounts that accepted its terms may download it",
        "the token of such an account",
        "accept the terms at https://huggingface.co/{repo}, then pass --token or run `hf auth login`",
        found="no token, or one without access",
    ),
    "RevisionNotFoundError": _Refusal(
        UsageError,
        "{repo} has no revision {revision!r}",
        "a branch, tag or commit of it",
        "omit --revision, or use one listed at https://huggingface.co/{repo}/commits/main",
        found="revision not found",
    ),
    "RepositoryNotFoundError": _Refusal(
        UsageError,
        "the hub has no repository {repo}, or it is private",
        "a hub id (owner/name) that the token may read",
        "{names}; for a private one pass --token or run `hf auth login`",
        found="repository not found",
    ),
    "HFValidationError": _Refusal(UsageError, "{repo!r} is not a hub id", "owner/name", "{names}"),
    "HfHubHTTPError": _Refusal(
        DependencyError,
        "the hub refused to send {repo}",
        "access to the repository",
        "try again later; for private or gated files pass --token or run `hf auth login`",
    ),
    "ValueError": _NOT_POSSIBLE,
    "RemoteProtocolError": _BROKEN_OFF,
    "ReadError": _BROKEN_OFF,
    "WriteError": _BROKEN_OFF,
}
_NOT_WRITABLE = _Refusal(
    DependencyError,
    "the hub does not accept what is pushed to {repo}",
    "a token that may write to it",
    "run `hf auth login` with a token that may write to {repo}, or pass it with --token",
)
_PUSHED_MEANWHILE = _Refusal(
    DependencyError,
    "somebody else pushed to {repo} meanwhile",
    "a repository that nobody else changes during the push",
    "run the same command again: large files that are already on the hub are not sent again",
)
_BUSY = _Refusal(
    DependencyError,
    "the hub cannot take what is pushed to {repo} now",
    "a hub that answers",
    "try again later: large files that are already on the hub are not sent again",
)
_NOT_ACCEPTED = _Refusal(
    DependencyError, "the hub refused what is pushed to {repo}", "a name and files that it accepts", "see what was found"
)
#: Those of `_REFUSALS` that mean something else when files are sent.
_REFUSALS_OF_PUSH = {"GatedRepoError": _NOT_WRITABLE, "RepositoryNotFoundError": _NOT_WRITABLE}
#: What an HfHubHTTPError means then, by its status. Those from 500 on mean `_BUSY`, all others `_NOT_ACCEPTED`.
_STATUS_OF_PUSH = {401: _NOT_WRITABLE, 403: _NOT_WRITABLE, 404: _NOT_WRITABLE, 412: _PUSHED_MEANWHILE, 429: _BUSY}
#: How huggingface_hub says that fewer bytes came than the file has. It is a plain OSError.
_TOO_SHORT = "Consistency check failed"


@contextmanager
def hub_errors(
    repo: str,
    revision: str | None,
    offline: bool,
    first: Sequence[str],
    *,
    names: str = LIST_VARIANTS,
    pushing: bool = False,
    transfer: bool = False,
) -> Iterator[None]:
    """Turn huggingface_hub's errors into ours. Disk errors pass through.

    first: the files that are asked for first.
    names: where to find names of repositories.
    pushing: files are sent, not received.
    transfer: the block does nothing but transfer files, so a RuntimeError or ValueError is not one of ours.
    """
    from huggingface_hub import errors

    classes = ("HFValidationError", "EntryNotFoundError", "XetDownloadError", "FileMetadataError", "LocalTokenNotFoundError")
    # HfHubHTTPError's bases are OSError and the error class of the HTTP client, which differs between versions.
    kinds = (*errors.HfHubHTTPError.__bases__, *(getattr(errors, name) for name in classes if hasattr(errors, name)))
    if transfer:  # huggingface_hub wraps what went wrong with an upload, and some of it has no classes of its own
        kinds = (*kinds, RuntimeError, ValueError)
    try:
        yield
    except kinds as error:
        if isinstance(error, OSError) and is_disk_error(error):
            raise
        cause = _cause(error)
        refusal = _refusal(cause if isinstance(error, RuntimeError) else error, offline, pushing)
        texts: dict[str, Any] = {"repo": repo, "revision": revision, "first": " or ".join(first), "names": names}
        raise refusal.kind(
            refusal.message.format(**texts),
            found=refusal.found or (" ".join(str(cause).split()) if refusal is _NOT_POSSIBLE else first_line(cause)),
            wanted=refusal.wanted.format(**texts),
            fix=refusal.fix.format(**texts),
        ) from error


def _cause(error: BaseException) -> BaseException:
    """What went wrong, if huggingface_hub wrapped it into `error`."""
    wraps = isinstance(error, RuntimeError) or type(error).__name__ == "LocalEntryNotFoundError"
    return error.__cause__ if wraps and error.__cause__ is not None else error


def _refusal(error: BaseException, offline: bool, pushing: bool) -> _Refusal:
    ancestors = [kind.__name__ for kind in type(error).__mro__]
    for name, row in {**_REFUSALS, **(_REFUSALS_OF_PUSH if pushing else {})}.items():
        if name in ancestors:
            return _refusal_of_push(error) if pushing and name == "HfHubHTTPError" else row
    if isinstance(error, RuntimeError) or first_line(error).startswith(_TOO_SHORT):
        return _BROKEN_OFF
    return _OFFLINE if offline else _UNREACHABLE


def _refusal_of_push(error: Any) -> _Refusal:
    """What an HfHubHTTPError means when files are sent."""
    status = error.response.status_code
    return _STATUS_OF_PUSH.get(status, _BUSY if status >= 500 else _NOT_ACCEPTED)
