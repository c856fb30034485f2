"""The Hugging Face Hub as ``push`` uses it: a token, a repository and one commit.

All calls go through huggingface_hub. ``HF_ENDPOINT`` names another server, and ``HF_TOKEN`` or the
file of ``hf auth login`` hold the token.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megamask.errors import ArtifactError, ConfigError

if TYPE_CHECKING:
    from huggingface_hub import HfApi

WRITE = "Check the name of the repository, the network and the rights of the token, and push again."


@dataclass(frozen=True)
class Stale:
    """The files of an older push that a push deletes where it does not write them again.

    Attributes:
        stamp: the file that every push leaves. Without it nothing in a repository is of a push.
        patterns: of the names, as ``fnmatch`` reads them.
    """

    stamp: str
    patterns: Sequence[str]


def check_repo(repo: str) -> None:
    """Check the name of a repository.

    Raises:
        ConfigError: the name is not ``OWNER/NAME`` in the Hub's letters.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils._validators import validate_repo_id

    allowed, fix = "OWNER/NAME in letters, digits, -, _ and .", "Write megamask push OWNER/NAME."
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise ConfigError("REPO", repo, f"{allowed} ({_first_line(error)})", fix) from error
    if repo.count("/") != 1:
        raise ConfigError("REPO", repo, allowed, fix)


def logged_in() -> HfApi:
    """The Hub, with a token that it knows.

    Raises:
        ConfigError: there is no token, or the token may only read.
        ArtifactError: the Hub does not take the token, or does not answer.
    """
    from huggingface_hub import HfApi, get_token

    endpoint = os.environ.get("HF_ENDPOINT") or None
    try:
        token = get_token()
        api = HfApi(endpoint=endpoint, token=token or False, library_name="megamask")
        known = api.whoami() if token else None
    except Exception as error:  # requests or httpx: the library has changed between them
        where = endpoint or "https://huggingface.co"
        problem = f"does not take the token or does not answer ({_first_line(error)})"
        raise ArtifactError(where, problem, "Check HF_TOKEN and the network.") from error
    allowed = "a token of the Hugging Face Hub that may write"
    fix = "Run hf auth login, or set HF_TOKEN. push --dry-run needs none."
    if known is None:
        raise ConfigError("HF_TOKEN", None, allowed, fix)
    if _role(known) == "read":
        raise ConfigError("HF_TOKEN", "a token that may only read", allowed, fix)
    return api


def _role(known: Any) -> str:
    """What a token may do, where the Hub says it: read, write or fineGrained; "" elsewhere."""
    for key in ("auth", "accessToken", "role"):
        known = known.get(key) if isinstance(known, Mapping) else None
    return str(known or "")


def open_repo(api: HfApi, repo: str, private: bool) -> None:
    """Make the repository if it is not there, before anything is built for it.

    Args:
        api: from ``logged_in``.
        repo: ``OWNER/NAME``.
        private: whether a new repository is private.

    Raises:
        ArtifactError: the Hub refuses or does not answer, or the repository is there and public.
    """
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        is_public = private and not api.model_info(repo).private
    except Exception as error:  # see logged_in
        raise _unwritten(api, repo, error) from error
    if is_public:
        problem = "is public, and --private was asked for; nothing was uploaded"
        fix = "Make it private on the Hub, choose another name, or leave out --private."
        raise ArtifactError(f"{api.endpoint}/{repo}", problem, fix)


def upload(api: HfApi, repo: str, folder: Path, message: str, stale: Stale) -> str:
    """Upload a folder in one commit; the address of the commit. Files of the repository that the
    folder lacks stay, unless they are of an older push.

    Args:
        api: from ``logged_in``.
        repo: ``OWNER/NAME``, from ``open_repo``.
        folder: the files.
        message: of the commit.
        stale: the files that the same commit deletes where the folder lacks them.

    Raises:
        ArtifactError: the Hub refuses or does not answer.
    """
    try:
        was_pushed = stale.stamp in api.list_repo_files(repo)
        done = api.upload_folder(
            repo_id=repo,
            folder_path=folder,
            commit_message=message,
            delete_patterns=list(stale.patterns) if was_pushed else None,
        )
    except Exception as error:  # see logged_in
        raise _unwritten(api, repo, error) from error
    return str(done.commit_url)


def _unwritten(api: HfApi, repo: str, error: Exception) -> ArtifactError:
    problem = f"cannot be written ({_first_line(error)})"
    return ArtifactError(f"{api.endpoint}/{repo}", problem, WRITE)


def _first_line(error: BaseException) -> str:
    """The first line of an error of the library, or of its cause, without a token."""
    chain: list[BaseException] = [error]
    while (cause := chain[-1].__cause__) is not None and len(chain) < 5:
        chain.append(cause)
    lines = [line for one in chain for line in str(one).splitlines() if line.strip()]
    text = lines[0] if lines else type(error).__name__
    return re.sub(r"hf_\w+", "hf_…", text)[:200]
