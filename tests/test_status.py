"""What a server's ``/status`` says, in the words of NDIF 0.1.2 and of the simulated server."""

from typing import Any

import pytest

from persona_nns.runs.remote.environment import Deployment, read_deployments

KEY = 'nnsight.modeling.transformers.TransformersModel:{"repo_id": "%s", "revision": %s, "task": "text-generation"}'  # noqa: E501


class Told:
    """A connection that answers this."""

    def __init__(self, deployments: dict[str, Any]) -> None:
        self._answer = {"deployments": deployments, "cluster": {"nodes": {}}}

    def ask(self, path: str) -> Any:
        assert path == "/status"
        return self._answer


def read(deployments: dict[str, Any]) -> list[Deployment]:
    return read_deployments(Told(deployments))  # type: ignore[arg-type]


def replica(name: str, revision: str = "null", number: int = 0) -> str:
    return f"e42b{number}:ModelActor:{KEY % (name, revision)}"


def test_a_replica_that_says_only_that_it_runs() -> None:
    # Copied from the real server: one entry for the replica, one for the files on disk.
    told = {
        replica("a/llama"): {"application_state": "RUNNING"},
        "a/llama": {"deployment_level": "COLD", "repo_id": "a/llama"},
        "b/cold": {"deployment_level": "COLD", "repo_id": "b/cold"},
    }
    assert read(told) == [
        Deployment("a/llama", "main", "", "RUNNING", 1),
        Deployment("b/cold", "main", "COLD", "", 0),
    ]


def test_a_replica_of_which_the_server_knows_all() -> None:
    entry = {
        "application_state": "RUNNING",
        "deployment_level": "HOT",
        "repo_id": "a/llama",
        "revision": "abc",
    }
    assert read({replica("a/llama", '"abc"'): entry}) == [
        Deployment("a/llama", "abc", "HOT", "RUNNING", 1)
    ]


def test_several_replicas_are_a_row_and_revisions_are_rows() -> None:
    told = {
        replica("a/llama", number=1): {"application_state": "RUNNING"},
        replica("a/llama", number=2): {"application_state": "RUNNING"},
        replica("a/llama", number=3): {"application_state": "DEPLOYING"},
        replica("a/llama", '"v2"'): {"application_state": "DEPLOYING"},
        "a/llama": {"deployment_level": "COLD", "repo_id": "a/llama"},
    }
    assert read(told) == [
        Deployment("a/llama", "main", "", "RUNNING", 2),
        Deployment("a/llama", "v2", "", "DEPLOYING", 1),
    ]


def test_files_on_disk_are_no_model_beside_one_that_runs_at_another_revision() -> None:
    told = {
        replica("a/llama", '"v2"'): {"application_state": "RUNNING"},
        "a/llama": {"deployment_level": "COLD", "repo_id": "a/llama"},
    }
    assert read(told) == [Deployment("a/llama", "v2", "", "RUNNING", 1)]


@pytest.mark.parametrize("key", ["a:ModelActor:x:{nothing", 'a:ModelActor:x:["list"]'])
def test_a_key_that_says_nothing_is_a_name(key: str) -> None:
    assert read({key: {"application_state": "RUNNING"}}) == [
        Deployment(key, "main", "", "RUNNING", 1)
    ]
