"""Find models and texts on the Hugging Face hub, and explain its refusals."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from huggingface_hub import HfApi, errors, get_token
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from signlattice.errors import InputError

Kind = Literal["model", "dataset"]

_HTTP_ERROR: type[Exception] = vars(errors)["HTTPError"]
"""Base of the errors of the HTTP client that the installed huggingface_hub is built on."""


class Unreachable(InputError):
    """The hub does not answer, or is not to be asked: what is in the cache may still do."""


@dataclass(frozen=True)
class Repository:
    """A repository at one commit: ``sizes`` are bytes of its files, by path."""

    name: str
    revision: str
    sizes: dict[str, int]


def resolve(name: str, revision: str | None = None, kind: Kind = "model") -> Repository:
    """Find the commit that ``revision`` (branch, tag or commit; None: the main branch) names now.

    Raises ``InputError`` if the repository or the revision is not there, or may not be read with
    the token that is there, or with none; ``Unreachable`` without a network.
    """
    api = HfApi()
    ask = api.model_info if kind == "model" else api.dataset_info
    with refusals(name, revision):
        info = ask(name, revision=revision, files_metadata=True)
        if info.gated:  # its description is open to all, its files are not
            if get_token() is None:
                raise InputError(_gated(name, "there is no token"))
            api.auth_check(name, repo_type=kind)
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}
    assert info.sha is not None  # the hub names the commit of whatever it describes
    return Repository(name, info.sha, sizes)


def _gated(name: str, why: str) -> str:
    return (
        f"{name} is gated and {why}: accept its terms at https://huggingface.co/{name} and "
        "give your token by `hf auth login` or in HF_TOKEN"
    )


@contextmanager
def refusals(name: str, revision: str | None = None) -> Iterator[None]:
    """Raise ``InputError`` and ``Unreachable`` for the errors of the hub's client."""
    try:
        yield
    except GatedRepoError:
        raise InputError(_gated(name, "the token that is given has no access")) from None
    except RevisionNotFoundError:
        raise InputError(
            f"{name} has no revision {revision!r}: give a branch, a tag or a commit of it"
        ) from None
    except RepositoryNotFoundError:
        hint = "" if get_token() else ", or log in with `hf auth login` if it is private"
        raise InputError(f"no {name!r} on the hub: check its spelling{hint}") from None
    except LocalEntryNotFoundError:
        raise Unreachable(
            f"{name} is not in the cache and the hub is not to be asked, or out of reach: "
            "go online once, unset HF_HUB_OFFLINE, or give a folder"
        ) from None
    except EntryNotFoundError as error:
        raise InputError(
            f"{name} lacks a file that is needed: {str(error).splitlines()[0]}"
        ) from None
    except HFValidationError:
        raise InputError(
            f"{name!r} is neither a folder nor a name on the hub: give <owner>/<name>"
        ) from None
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        if status == 401:
            raise InputError(
                f"the hub refuses the token for {name}: log in anew with `hf auth login`"
            ) from None
        raise Unreachable(f"the hub answers {status} when asked for {name}: try later") from None
    except (_HTTP_ERROR, ConnectionError, TimeoutError) as error:
        raise Unreachable(
            f"{name} is not in the cache and the hub is out of reach ({type(error).__name__}): "
            "go online once, unset HF_HUB_OFFLINE, or give a folder"
        ) from None
