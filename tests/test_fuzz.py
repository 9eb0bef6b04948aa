"""Whatever is asked for, a failure is one sentence, and nothing is left half-written."""

import string
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nnsight import TransformersModel

import persona_nns as pn
from persona_nns.cli import commands as cli
from persona_nns.declarations.catalog import load_experiment
from persona_nns.models.checkpoints import count_layers
from persona_nns.prompts.grids import Grid, load_grid
from persona_nns.prompts.templates import read_template
from persona_nns.results.locations import location_of
from persona_nns.results.store import check_writable
from persona_nns.runs.run import plan_run

GOLDEN = Path(__file__).parent / "golden"
shared = settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])

texts = st.text(max_size=12)
values = st.recursive(
    texts | st.integers() | st.booleans() | st.floats(allow_nan=False),
    lambda inner: st.lists(inner, max_size=3),
    max_leaves=4,
)
tables = st.dictionaries(
    st.sampled_from(["baseline", "a", "b.c", "ä", ""]) | texts, values, max_size=4
)


def toml(value: Any) -> str:
    """A value as TOML, with every character that is not plain escaped."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{', '.join(map(toml, value))}]"
    if isinstance(value, str):
        plain = string.ascii_letters + string.digits + " "
        escaped = "".join(c if c in plain else f"\\U{ord(c):08X}" for c in value)
        return f'"{escaped}"'
    return str(value)


def one_sentence(error: pn.PersonaError) -> None:
    message = str(error)
    assert message.strip()
    assert "\n" not in message
    assert "Traceback" not in message


@shared
@given(personas=tables, tasks=tables, markers=st.none() | tables)
def test_a_grid_file_is_a_grid_or_one_sentence(
    tmp_path: Path, personas: dict[str, Any], tasks: dict[str, Any], markers: dict[str, Any] | None
) -> None:
    file = tmp_path / "grid.toml"
    parts = {"personas": personas, "tasks": tasks} | ({"markers": markers} if markers else {})
    lines = [
        line
        for name, table in parts.items()
        for line in (f"[{name}]", *(f"{toml(k)} = {toml(v)}" for k, v in table.items()))
    ]
    file.write_text("\n".join(lines), encoding="utf-8", errors="surrogatepass")
    try:
        grid = load_grid(file)
    except pn.UsageError as error:
        one_sentence(error)
    else:
        assert "baseline" in grid.personas
        assert all(text.strip() for text in grid.personas.values())
        assert len(grid.cells) == (len(personas) - 1) * (len(tasks) - 1)


@shared
@given(data=st.binary(max_size=200))
def test_any_bytes_are_a_grid_or_one_sentence(tmp_path: Path, data: bytes) -> None:
    file = tmp_path / "grid.toml"
    file.write_bytes(data)
    with pytest.raises(pn.UsageError) as caught:
        load_grid(file)
    one_sentence(caught.value)


words = st.text(alphabet="0123456789,.-+ ;apl_gßx/*\n\0", max_size=10) | texts


@shared
@given(layers=st.none() | words, positions=st.none() | words, cells=st.none() | words)
def test_a_request_is_checked_or_one_sentence(
    tmp_path: Path,
    random_model: Callable[[str], TransformersModel],
    small_grid: Grid,
    layers: str | None,
    positions: str | None,
    cells: str | None,
) -> None:
    model = random_model("qwen2")
    store = tmp_path / "s.zarr"
    try:
        planned = plan_run(
            load_experiment("localized_positions"),
            model,
            small_grid,
            layers=layers,
            positions=positions,
            cells=cells,
            store=store,
        )
    except pn.UsageError as error:
        one_sentence(error)
    else:
        assert planned.request.units
        assert set(planned.request.arguments["layers"]) <= set(range(6))
    assert not store.exists()


@shared
@given(
    name=texts | st.sampled_from(["~nobody/x", "", " ", ".", "a\0b", "/proc/x", "x" * 300, "s3://"])
)
def test_a_store_is_a_place_or_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.iterdir())
    try:
        location_of(name)
        if "://" not in name:
            check_writable(name)
    except pn.PersonaError as error:
        one_sentence(error)
    assert sorted(tmp_path.iterdir()) == before


@shared
@given(name=texts | st.sampled_from(["~nobody/x", "a\0b", "x" * 300, "/", "..", "\udc80"]))
def test_names_of_files_and_models_are_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for read in (
        lambda: load_grid(name),
        lambda: load_grid(f"{name}.toml"),
        lambda: load_experiment(name),
        lambda: load_experiment(f"{name}.py"),
        lambda: read_template(name),
        lambda: count_layers(name),
    ):
        with pytest.raises(pn.PersonaError) as caught:
            read()
        one_sentence(caught.value)


options = st.sampled_from(
    ["--model", "--grid", "--layers", "--cells", "--dtype", "--device", "--store", "--batch-size"]
)


@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(arguments=st.lists(st.tuples(options, words), max_size=3))
def test_a_wrong_command_line_exits_with_two_and_writes_nothing(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[tuple[str, str]],
) -> None:
    monkeypatch.chdir(tmp_path)
    wrong = [
        "--grid",
        "none-such",
        *(part for pair in arguments for part in pair if "\0" not in part),
    ]
    command = ["run", "localized_positions", "--model", str(GOLDEN / "qwen2"), *wrong]
    monkeypatch.setattr(sys, "argv", ["persona-nns", *command, "--grid", "no-such-grid"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    printed = capsys.readouterr()
    assert stop.value.code == 2
    assert printed.err.startswith("error: ")
    assert "Traceback" not in printed.err
    assert list(tmp_path.iterdir()) == []


def test_a_pickled_checkpoint_is_refused(make_folder: Callable[..., Path]) -> None:
    import torch
    from safetensors.torch import load_file

    folder = make_folder("qwen2")
    weights = folder / "model.safetensors"
    torch.save(load_file(weights), folder / "pytorch_model.bin")
    weights.unlink()
    with pytest.raises(pn.PersonaError, match="safetensors") as caught:
        pn.load_model(folder)
    one_sentence(caught.value)


def test_code_of_a_model_is_run_only_when_asked(make_folder: Callable[..., Path]) -> None:
    import json

    folder = make_folder("qwen2")
    ran = folder / "ran"
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.MineConfig"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "mine.py").write_text(
        "from pathlib import Path\nfrom transformers import Qwen2Config\n"
        f"Path({str(ran)!r}).touch()\n"
        "class MineConfig(Qwen2Config):\n    model_type = 'mine'\n"
    )
    with pytest.raises(
        pn.UsageError, match=r"brings code of its own.*--trust-remote-code"
    ) as caught:
        pn.load_model(folder)
    one_sentence(caught.value)
    assert not ran.exists()
    with pytest.raises(pn.PersonaError):  # it runs, and is no model that we know
        pn.load_model(folder, trust_remote_code=True)
    assert ran.exists()
