"""Imports go one way: nothing below knows anything above."""

import ast
import subprocess
import sys
from pathlib import Path

import ftlit

ROOT = Path(ftlit.__file__).parent
TIERS = [
    {"errors", "batch", "cache", "shipped", "files", "ranks", "device", "run_config", "run_folder"},
    {"objectives", "data", "models", "peft", "metrics"},
    {"rollout", "forgetting"},
    {"stages", "callbacks", "export"},
    {"cli_errors", "cli", "compare", "verbs", "testing", "__main__"},
]
TIER = {room: level for level, rooms in enumerate(TIERS) for room in rooms}
# A control of forgetting acts on a stage: it may name its type, and nothing more.
TYPE_ONLY = ("forgetting", "stages.base")
NEVER = [("objectives", "models"), ("objectives", "batch"), ("peft", "stages"), ("data.formats", "models")]


def imports(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    guarded = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING" and path.parent.name == TYPE_ONLY[0]
        for inner in ast.walk(node)
        if isinstance(inner, ast.ImportFrom) and inner.module == f"ftlit.{TYPE_ONLY[1]}"
    }
    for node in ast.walk(tree):
        if id(node) in guarded:
            continue
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("ftlit"):
            names = [node.module] if node.module != "ftlit" else [f"ftlit.{alias.name}" for alias in node.names]
            yield from names
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("ftlit."))


def edges():
    for path in ROOT.rglob("*.py"):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for target in imports(path):
            yield module, target.removeprefix("ftlit.")


def test_every_room_has_its_place():
    rooms = {path.stem for path in ROOT.glob("*.py")} | {path.name for path in ROOT.iterdir() if path.is_dir()}
    assert rooms - set(TIER) <= {"__init__", "__pycache__", "configs"}


def test_imports_go_one_way():
    wrong = []
    for module, target in edges():
        here, there = module.split(".")[0], target.split(".")[0]
        if here in TIER and there in TIER and TIER[there] > TIER[here]:
            wrong.append(f"{module} -> {target}")
    assert not wrong


def test_rooms_that_must_not_know_each_other():
    wrong = [
        f"{module} -> {target}"
        for module, target in edges()
        for here, there in NEVER
        if (module + ".").startswith(here + ".") and (target + ".").startswith(there + ".")
    ]
    assert not wrong


def test_formats_need_neither_torch_nor_a_tokenizer():
    for path in (ROOT / "data" / "formats").glob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert "import torch" not in text
        assert "transformers" not in text


def test_light_verbs_do_not_import_torch():
    script = (
        "import sys; from ftlit.__main__ import main\n"
        "for args in (['--help'], ['--version'], ['configs'], ['nonsense'], ['export']): main(args)\n"
        "for verb in ('generate', 'chat', 'export', 'compare'):\n"
        "    try: main([verb, '--help'])\n"
        "    except SystemExit: pass\n"
        "assert 'torch' not in sys.modules and 'lightning' not in sys.modules, 'heavy imports'"
    )
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)


def test_public_names_exist():
    for name in ftlit.__all__:
        assert getattr(ftlit, name)
