"""The documents against the code: the tree of files, every command that a page names, every
link.
"""

import argparse
import importlib
import re
import runpy
import shlex
import subprocess
import sys

import pytest

import diffmoe.__main__ as run
from diffmoe.config import Config, check_training, load_config, override
from launcher.__main__ import SUBCOMMANDS as LAUNCHER_SUBCOMMANDS
from programs import REPOSITORY

PAGES = [
    *sorted(REPOSITORY.glob("*.md")),
    *sorted((REPOSITORY / "docs").glob("*.md")),
    REPOSITORY / "docs/results/README.md",
]


def blocks(text: str) -> list[str]:
    return re.findall(r"^```\w*\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def test_the_tree_has_one_line_a_module():
    tree = next(
        block
        for block in blocks((REPOSITORY / "docs/architecture.md").read_text())
        if block.startswith("run.py     ") and "the program" in block
    )
    listed, folder = [], ""
    for line in filter(None, tree.splitlines()):
        name = line.split()[0]
        folder = name if name.endswith("/") else folder if line.startswith(" ") else ""
        assert (REPOSITORY / folder / name.removeprefix(folder)).exists(), line
        listed += [] if name.endswith("/") else [folder + name]
    modules = {
        str(path.relative_to(REPOSITORY))
        for top in ("diffmoe", "launcher")
        for path in (REPOSITORY / top).rglob("*.py")
        if path.name != "__init__.py"
    }
    assert len(listed) == len(set(listed))
    assert {name for name in listed if name.endswith(".py")} == {"run.py", *modules}


def commands(page: str) -> list[list[str]]:
    """Command lines of a page's blocks, and of its text where they are set as code."""
    text = page.replace("\\\n", " ")
    lines = [re.sub(r"\s#.*", "", line) for block in blocks(text) for line in block.splitlines()]
    prose = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    return [
        shlex.split(line)
        for line in [*lines, *re.findall(r"`([^`\n]+)`", prose)]
        if re.search(r"^\s*make |\brun\.py -|\brun\.py [a-z]|-m launcher [a-z]|\bsbatch ", line)
        and "…" not in line
    ]


class Options(Exception):
    """What a parser knows."""


@pytest.fixture
def options_of(monkeypatch):
    def tell(parser, *_):
        raise Options({option for action in parser._actions for option in action.option_strings})

    for name in ("parse_args", "parse_known_args", "parse_intermixed_args"):
        monkeypatch.setattr(argparse.ArgumentParser, name, tell)

    def options(main, *arguments):
        with pytest.raises(Options) as caught:
            main(*arguments)
        return caught.value.args[0]

    return options


def known_options(words: list[str], options_of) -> tuple[list[str], set[str]]:
    """(what follows the verb, the verb's options)."""
    if "run.py" in words:
        rest = words[words.index("run.py") + 1 :]
        verb, rest = (rest[0], rest[1:]) if rest and rest[0] in run.SUBCOMMANDS else ("train", rest)
        return rest, options_of(run._main_of(verb), rest, run.detect())
    rest = words[words.index("launcher") + 1 :]
    assert rest[0] in LAUNCHER_SUBCOMMANDS, words
    return rest[1:], options_of(importlib.import_module(f"launcher.{rest[0]}").main, rest[1:])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_commands_name_verbs_options_fields_and_files_that_exist(page, options_of):
    targets = re.findall(r"^([\w-]+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE)
    for words in commands(page.read_text()):
        if words[0] == "make":
            assert words[1] in targets, words
            continue
        rest = words
        if "sbatch" not in words:
            rest, options = known_options(words, options_of)
            assert {word.partition("=")[0] for word in rest if word.startswith("--")} <= options, (
                words
            )
        for word in rest:
            if word.startswith(("configs/", "ds_configs/", "scripts/")):
                assert (REPOSITORY / word).is_file(), words
        said = [word for word in rest if re.match(r"[a-z]+\.\w+=", word)]
        override(Config(), said)
        if "run.py --config configs/" in " ".join(words):  # it trains
            check_training(load_config(rest[1], said))


def anchors(page: str) -> set[str]:
    """What a page's headings are linked as."""
    titles = re.findall(r"^#+ (.*)$", page, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        there = page.parent / path if path else page
        assert there.exists(), target
        assert not anchor or anchor in anchors(there.read_text()), target


# Results speak of the code as it was, and CONTRIBUTING.md of a module that there is not.
@pytest.mark.parametrize(
    "page",
    [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))],
    ids=lambda page: page.name,
)
def test_modules_that_a_page_names_exist(page):
    there = [f"/{path}" for path in REPOSITORY.rglob("*.py") if "/." not in str(path)]
    for name in re.findall(r"`((?:\w+/)*\w+\.py)`", page.read_text()):
        assert any(path.endswith(f"/{name}") for path in there), name


def test_the_readme_is_a_front_door():
    lines = (REPOSITORY / "README.md").read_text().splitlines()
    assert len(lines) <= 150
    assert [line for line in lines if len(line) > 120 and not line.startswith("|")] == []
    linked = set(re.findall(r"\]\((docs/[\w/]+\.md)\)", "\n".join(lines)))
    assert linked >= {
        str(path.relative_to(REPOSITORY)) for path in (REPOSITORY / "docs").glob("*.md")
    }


def test_the_site_builds_without_a_dead_link(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "-q", "-d", str(tmp_path)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert (tmp_path / "troubleshooting/index.html").is_file()


def test_the_configurations_page_is_what_the_code_says():
    written = runpy.run_path(str(REPOSITORY / "docs/reference.py"))["reference"]()
    assert (REPOSITORY / "docs/configuration.md").read_text() == written, (
        "run: python docs/reference.py"
    )


def test_the_settings_of_routers_are_accepted(tmp_path):
    settings = blocks((REPOSITORY / "docs/routers.md").read_text())
    assert len(settings) == 6
    for text in settings:
        path = tmp_path / "router.yaml"
        path.write_text(text)
        load_config(path)
