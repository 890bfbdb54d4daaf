"""The arrows between modules run downward: every import in the tree, those inside functions and for
type checkers too.
"""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# From the top.  A module imports its own entry and what lies below; entries of one line do not know
# each other.
LAYERS = [
    ["run"],
    [
        "diffmoe.__main__",
        "launcher",
    ],
    ["diffmoe.bench"],  # more of the verb bench, which loads its kinds by name
    ["diffmoe.commands"],
    ["diffmoe.pipeline"],
    ["diffmoe.parity", "diffmoe.huggingface", "diffmoe.compare"],
    ["diffmoe.training"],
    ["diffmoe.evaluation"],
    ["diffmoe.diffusion", "diffmoe.data", "diffmoe.cost"],
    ["diffmoe.models"],
    ["diffmoe.checkpoints"],
    ["diffmoe.moe"],
    ["diffmoe.parallel", "diffmoe.gradient_sums"],
    ["diffmoe.deepspeed_json"],
    ["diffmoe.deepspeed_keys"],
    ["diffmoe.layout"],
    [
        "diffmoe.config",
        "diffmoe.device",
        "diffmoe.markdown",
        "diffmoe.placement",
        "diffmoe.progress",
        "diffmoe.random_streams",
    ],
    ["diffmoe.config_rules"],
    ["diffmoe.families"],
    ["diffmoe.schema"],
    ["diffmoe.sample_schema", "diffmoe.train_schema"],
    ["diffmoe.strict_yaml", "diffmoe.environment", "diffmoe.gpus", "diffmoe.code_version"],
    ["diffmoe"],
    ["diffmoe.remote"],
    ["diffmoe.paths", "diffmoe.files"],
    ["diffmoe.errors"],
]
HEIGHT = {entry: -i for i, entries in enumerate(LAYERS) for entry in entries}
# Packages that only some may import, wherever in the module it stands.
ONLY = {
    "deepspeed": [
        "diffmoe.training.engine",
        "diffmoe.training.zero_optimizers",
        "diffmoe.training.zero_parameters",
    ],
    "diffmoe.commands": ["diffmoe.__main__", "diffmoe.commands", "diffmoe.bench"],
}


@pytest.mark.full
def test_a_ranks_start_brings_no_figures_and_no_scikit_learn():
    """Seconds for every rank, of which most need neither."""
    code = (
        "import sys, diffmoe.training.loop; "
        "print([m for m in ('matplotlib', 'sklearn', 'scipy.ndimage') if m in sys.modules])"
    )
    said = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=240
    )
    assert said.stdout == "[]\n", said


def source_files():
    return [
        ROOT / "run.py",
        *sorted(path for top in ("diffmoe", "launcher") for path in (ROOT / top).rglob("*.py")),
    ]


def module_of(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def entry_of(module):
    """The layers' entry that a module belongs to; a module without one, also other people's, stands
    for itself.
    """
    packages = (
        entry for entry in HEIGHT if entry != "diffmoe" and (module + ".").startswith(entry + ".")
    )
    return next(packages, module)


def imports_of(tree, modules):
    """Full names of the modules that a module imports."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports are absolute here"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in modules else node.module


def faults(module, text, modules):
    """What is wrong with a module's imports, in words."""
    own, found = entry_of(module), []
    for name in sorted(set(imports_of(ast.parse(text), modules))):
        entry = entry_of(name)
        if entry in HEIGHT and entry != own and HEIGHT[entry] >= HEIGHT[own]:
            found.append(f"{module} imports {name}, which does not lie below it")
        found += [
            f"{module} imports {name}, which is for {', '.join(allowed)}"
            for package, allowed in ONLY.items()
            if (name + ".").startswith(package + ".")
            and not (module + ".").startswith(tuple(a + "." for a in allowed))
        ]
    return found


MODULES = {module_of(path): path.read_text() for path in source_files()}


def test_every_module_has_a_layer():
    lost = [module for module in MODULES if entry_of(module) not in HEIGHT]
    assert not lost, f"{lost}: give them a place in LAYERS"


# The package itself names what users import, and loads it when it is asked for.
@pytest.mark.parametrize("module", [module for module in MODULES if module != "diffmoe"])
def test_arrows_run_downward(module):
    assert faults(module, MODULES[module], MODULES) == []


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("diffmoe.moe.layer", "from diffmoe.models.dit import DiT"),
        ("diffmoe.evaluation.card", "def f():\n    from diffmoe.training import checkpoint"),
        ("diffmoe.evaluation.card", "from diffmoe import training"),
        ("diffmoe.data.shards", "import diffmoe.commands.common"),
        ("diffmoe.data.shards", "from diffmoe.diffusion.times import uniform_steps"),
        ("diffmoe.moe.layer", "from deepspeed.utils import groups"),
        ("diffmoe.environment", "from diffmoe.config import Config"),
    ],
)
def test_an_upward_arrow_is_found(module, line):
    assert faults(module, line, {*MODULES, "diffmoe.training"})


def test_the_launcher_needs_no_torch_to_be_imported():
    for module, text in MODULES.items():
        if module.startswith("launcher"):
            top = ast.Module(
                [
                    node
                    for node in ast.parse(text).body
                    if isinstance(node, (ast.Import, ast.ImportFrom))
                ],
                [],
            )
            assert "torch" not in {name.split(".")[0] for name in imports_of(top, MODULES)}


def test_what_is_imported_is_declared_and_the_other_way_round():
    """apex stays optional (PyPI's is another's), and torch.utils.tensorboard imports
    tensorboard.
    """
    text = (ROOT / "pyproject.toml").read_text()
    project, _, optional = text.partition("\n[project.optional")
    declared = set(re.findall(r'^    "([A-Za-z0-9_-]+)', project, re.MULTILINE))
    features = re.search(r"^features = \[(.*)\]$", optional, re.MULTILINE)
    declared |= set(re.findall(r'"([a-z0-9_]+)', features[1]))
    modules = {"pyyaml": "yaml", "pillow": "PIL", "scikit-learn": "sklearn"}
    own = {"diffmoe", "launcher", *sys.stdlib_module_names}
    imported = {
        name.partition(".")[0]
        for text in MODULES.values()
        for name in imports_of(ast.parse(text), MODULES)
    }
    assert imported - own == {modules.get(name, name) for name in declared} - {"tensorboard"} | {
        "apex"
    }
