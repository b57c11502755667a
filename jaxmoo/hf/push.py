"""Uploads exported models to a Hugging Face hub."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from jaxmoo.errors import ConfigError, JaxmooError
from jaxmoo.files.at_hand import at_hand

__all__ = ["PushError", "prepare_push", "push"]


class PushError(JaxmooError):
    """A model could not be uploaded; it is whole where it was exported."""

    exit_code = 1


def prepare_push(repository: str, private: bool | None = None) -> str:
    """Make a repository unless it is there; so that what is missing is known before long work.

    Args:
      repository: its name, ``owner/name``; without the owner, that of the token.
      private: whether only its owner sees it, if it is made; None leaves it to the hub.

    Returns:
      Its whole name.

    Raises:
      ConfigError: there is no token, it may not write there, or the hub cannot be reached.
    """
    if get_token() is None:
        raise ConfigError(
            f"push_to_hub={repository}: there is no token of a Hugging Face hub here. Log in with "
            "`hf auth login`, or set HF_TOKEN to a token that may write."
        )
    try:
        with _explained(repository):
            made = HfApi().create_repo(repository, private=private, exist_ok=True)
    except PushError as error:
        raise ConfigError(str(error)) from error.__cause__
    return made.repo_id


def push(directory: Path, repository: str, message: str) -> str:
    """Upload a directory, with its card; files that are there already are not sent again.

    Args:
      directory: where the model was exported to; from a bucket it is fetched first.
      repository: the whole name of a repository that is there.
      message: what the commit says.

    Returns:
      The address of the commit.

    Raises:
      PushError: it could not be uploaded.
    """
    with _explained(repository), at_hand(directory, ["*"]) as folder:
        done = HfApi().upload_folder(repo_id=repository, folder_path=folder, commit_message=message)
    return str(done.commit_url)


@contextlib.contextmanager
def _explained(repository: str) -> Iterator[None]:
    try:
        yield
    except HFValidationError as error:
        raise PushError(f"push_to_hub={repository} is no name of a repository: {error}") from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        reason = {
            401: "the hub does not know the token. Log in again with `hf auth login`",
            403: "the token may not write there. Make one that may, or name another repository",
        }.get(
            status,
            f"the hub answers {status}: {error.server_message or error.response.reason_phrase}",
        )
        raise PushError(f"push_to_hub={repository}: {reason}.") from error
    except JaxmooError:  # the run is asked to stop
        raise
    # Connections fail in ways that depend on the library below, which versions have changed.
    except Exception as error:
        raise PushError(f"push_to_hub={repository}: the hub cannot be reached: {error}") from error
