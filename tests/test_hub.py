from __future__ import annotations

from types import SimpleNamespace

import httpx2
import pytest
from huggingface_hub import errors

from signlattice import hub
from signlattice.errors import InputError
from signlattice.hub import Unreachable, resolve

SHA = "a" * 40


def response(status: int) -> httpx2.Response:
    return httpx2.Response(status, request=httpx2.Request("GET", "https://hub.invalid"))


class Api:
    """The hub's client, with answers set beforehand."""

    info: object = None
    access: Exception | None = None

    def model_info(self, name, *, revision, files_metadata):
        assert files_metadata
        if isinstance(self.info, Exception):
            raise self.info
        return self.info

    dataset_info = model_info

    def auth_check(self, name, *, repo_type):
        if self.access is not None:
            raise self.access


@pytest.fixture
def api(monkeypatch):
    monkeypatch.setattr(hub, "HfApi", Api)
    monkeypatch.setattr(hub, "get_token", lambda: None)
    files = [SimpleNamespace(rfilename="config.json", size=10)]
    monkeypatch.setattr(Api, "info", SimpleNamespace(sha=SHA, gated=False, siblings=files))
    return lambda **answers: [monkeypatch.setattr(Api, *answer) for answer in answers.items()]


@pytest.mark.parametrize("kind", ["model", "dataset"])
def test_resolve_makes_a_commit_of_a_revision(api, kind):
    found = resolve("owner/name", "main", kind)
    assert (found.revision, found.sizes) == (SHA, {"config.json": 10})


@pytest.mark.parametrize(
    ("refusal", "told"),
    [
        (errors.RepositoryNotFoundError("", response=response(404)), "no 'owner/name' on the hub"),
        (errors.RevisionNotFoundError("", response=response(404)), "no revision 'v9'"),
        (errors.GatedRepoError("", response=response(403)), "gated and the token.*no access"),
        (errors.HfHubHTTPError("", response=response(401)), "refuses the token.*hf auth login"),
        (errors.HFValidationError(""), "neither a folder nor a name"),
    ],
)
def test_resolve_tells_of_a_refusal(api, refusal, told):
    api(info=refusal)
    with pytest.raises(InputError, match=told) as caught:
        resolve("owner/name", "v9")
    assert not isinstance(caught.value, Unreachable)


@pytest.mark.parametrize(
    "failure",
    [
        errors.OfflineModeIsEnabled(""),
        httpx2.ConnectError(""),
        httpx2.ReadTimeout(""),
        errors.HfHubHTTPError("", response=response(503)),
    ],
)
def test_resolve_tells_a_hub_out_of_reach_apart(api, failure):
    api(info=failure)
    with pytest.raises(Unreachable):
        resolve("owner/name")


def test_resolve_needs_a_token_and_access_for_a_gated_model(api, monkeypatch):
    api(info=SimpleNamespace(sha=SHA, gated="manual", siblings=[]))
    with pytest.raises(InputError, match="gated and there is no token: accept.*HF_TOKEN"):
        resolve("owner/name")
    monkeypatch.setattr(hub, "get_token", lambda: "token")
    assert resolve("owner/name").revision == SHA
    api(access=errors.GatedRepoError("", response=response(403)))
    with pytest.raises(InputError, match="the token that is given has no access"):
        resolve("owner/name")
