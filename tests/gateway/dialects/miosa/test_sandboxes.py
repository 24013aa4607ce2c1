import msgspec
import pytest

from gateway.dialects.miosa import sandboxes
from gateway.dialects.miosa.sandboxes import CreateSandboxRequest, create_command, sandbox
from gateway.errors import GatewayError
from gateway.resources import Attribution, Sandbox, SandboxState
from tests.support.calls import EFFECT_ID, WORKSPACE_ID, make_call

#: Fields that the oldest clients read from every sandbox and take as present.
EXPECTED_BY_OLD_CLIENTS = {
    "id",
    "state",
    "tenant_id",
    "owner_id",
    "template_id",
    "cpu_count",
    "memory_mb",
    "timeout_sec",
    "total_runtime_sec",
    "metadata",
    "created_at",
}


def make_sandbox(**changes) -> Sandbox:
    fields = {
        "id": EFFECT_ID,
        "workspace_id": WORKSPACE_ID,
        "owner_key_id": None,
        "name": "n",
        "slug": "n-1",
        "state": SandboxState.RUNNING,
        "template": "base",
        "base_template": "base",
        "cpu_count": 2.0,
        "memory_mib": 1024,
        "disk_mib": 3072,
        "env": {"SECRET": "x"},
        "metadata": {"k": "v"},
        "tags": ("a",),
        "attribution": Attribution(external_user_id="u"),
        "region": "local",
        "address": "10.0.0.2",
        "timeout_s": 300.0,
        "idle_timeout_s": None,
        "always_on": False,
        "created_at": 1_770_000_000.25,
        "started_at": 1_770_000_001.0,
        "destroyed_at": 1_770_000_011.0,
        "expires_at": None,
        "stop_cause": None,
        "stop_detail": None,
        "boot_ms": 123.4,
    }
    return Sandbox(**{**fields, **changes})


def create(**fields):
    return create_command(make_call(), msgspec.convert(fields, CreateSandboxRequest))


@pytest.mark.parametrize("field", ["template", "template_id", "image"])
def test_template_in_all_spellings(field):
    assert create(**{field: "python"}).template == "python"


@pytest.mark.parametrize(
    ("fields", "seconds"), [({"timeout_ms": 1500}, 1.5), ({"timeout_sec": 600}, 600.0), ({}, None)]
)
def test_lifetime_in_all_spellings(fields, seconds):
    assert create(**fields).timeout_s == seconds


def test_always_on_has_no_default_lifetime():
    assert create(always_on=True).timeout_s is None


@pytest.mark.parametrize("fields", [{"disk_mb": 100}, {"disk_size_mb": 100}])
def test_disk_in_all_spellings(fields):
    assert create(**fields).disk_mib == 100


def test_named_size_gives_way_to_numbers():
    command = create(size="small", memory_mb=512)
    assert (command.cpu_count, command.memory_mib) == (2.0, 512)


def test_effect_id_becomes_the_sandbox():
    assert create().effect_id == EFFECT_ID


def test_foreign_workspace_is_refused():
    assert create(workspace_id=WORKSPACE_ID)
    with pytest.raises(GatewayError, match="workspace_id"):
        create(workspace_id="other")


def test_answer_has_what_old_clients_take_for_granted():
    answer = sandbox(make_sandbox())
    assert answer.keys() >= EXPECTED_BY_OLD_CLIENTS
    assert all(answer[name] is not None for name in EXPECTED_BY_OLD_CLIENTS)


def test_answer_spells_both_ways():
    answer = sandbox(make_sandbox())
    assert answer["state"] == answer["status"] == "running"
    assert answer["ready"] is True
    assert answer["template"] == answer["template_id"] == answer["image_id"] == "base"
    assert answer["disk_mb"] == answer["disk_size_mb"] == 3072
    assert (answer["timeout_sec"], answer["timeout_ms"]) == (300, 300_000)
    assert answer["created_at"] == "2026-02-02T02:40:00.250Z"
    assert answer["total_runtime_sec"] == 10
    assert answer["cpu_count"] == 2


def test_answer_keeps_variables_to_itself():
    assert "SECRET" not in str(sandbox(make_sandbox()))


def test_always_on_answers_no_end():
    answer = sandbox(make_sandbox(always_on=True))
    assert (answer["timeout_sec"], answer["expires_at"], answer["timeout_remaining_ms"]) == (0, None, None)


@pytest.mark.parametrize("state", SandboxState)
def test_only_running_is_ready(state):
    answer = sandbox(make_sandbox(state=state))
    assert answer["ready"] == (state is SandboxState.RUNNING)


@pytest.mark.parametrize("timeout_ms", [999, sandboxes.LIFE_S_MAX * 1000 + 1])
def test_lifetime_is_bounded(timeout_ms):
    with pytest.raises(msgspec.ValidationError):
        create(timeout_ms=timeout_ms)
