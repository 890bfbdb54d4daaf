"""``~`` and ``$VAR`` in every path of a command line or YAML mean the same."""

import argparse
import dataclasses
import importlib
import os
import re
import typing
from pathlib import Path

import pytest

from diffmoe.commands.common import Parser
from diffmoe.config import Config, config_from_tree, config_to_tree, load_config, override
from diffmoe.environment import RankEnvironment
from diffmoe.errors import UserError
from diffmoe.paths import PathParser, expand_path
from launcher.__main__ import SUBCOMMANDS as LAUNCHER_SUBCOMMANDS
from launcher.__main__ import main as launcher_main
from programs import REPOSITORY, TINY, digits

ALONE = RankEnvironment(0, 1, 0, 1, "single")
PATH_FIELDS = [
    f"{section.name}.{field.name}"
    for section in dataclasses.fields(Config)
    for field in dataclasses.fields(typing.get_type_hints(Config)[section.name])
    if typing.get_type_hints(typing.get_type_hints(Config)[section.name])[field.name] is str
    and field.name != "mirror"  # an address: nothing in it is replaced
]


@pytest.fixture(autouse=True)
def places(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("SCRATCH", str(tmp_path / "scratch"))
    monkeypatch.setenv("NAME", "run_7")
    for name in ("UNSET", "scratch"):
        monkeypatch.delenv(name, raising=False)
    for name in ("home", "scratch"):
        (tmp_path / name).mkdir()


WRITTEN = {
    "~": "HOME",
    "~/runs": "HOME/runs",
    "$SCRATCH": "SCRATCH",
    "$SCRATCH/a/$NAME": "SCRATCH/a/run_7",
    "${SCRATCH}_2/x": "SCRATCH_2/x",
    "~/$NAME/~": "HOME/run_7/~",
    "": "",
    "runs/a": "runs/a",
    "a~": "a~",
    "5$": "5$",
    "owner/name": "owner/name",
    "data/shard-{000000..000007}.tar": "data/shard-{000000..000007}.tar",
    "$SCRATCH/s-{00..07}.tar": "SCRATCH/s-{00..07}.tar",
    "pipe:cat $UNSET/~ | gunzip": "pipe:cat $UNSET/~ | gunzip",
    "https://host/~user/$x.tar": "https://host/~user/$x.tar",
    "s3://b/$k": "s3://b/$k",
}


def meant(text):
    return text.replace("HOME", os.environ["HOME"]).replace("SCRATCH", os.environ["SCRATCH"])


@pytest.mark.parametrize("text", WRITTEN)
def test_what_a_path_means(text):
    assert expand_path(text) == meant(WRITTEN[text])


def test_a_home_folder_is_taken_as_it_is(monkeypatch):
    monkeypatch.setenv("HOME", "/home/$UNSET")
    assert expand_path("~/x") == "/home/$UNSET/x"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "$UNSET/x",
            "run.folder ($UNSET/x) names $UNSET, which is not set: set it, or write the path "
            "itself",
        ),
        ("~/${UNSET}", "run.folder (~/${UNSET}) names $UNSET, which is not set"),
        (
            "~nobody-of-that-name/x",
            "run.folder (~nobody-of-that-name/x) begins with ~nobody-of-that-name, which is no "
            "user of this machine: "
            "write ./~nobody-of-that-name/x",
        ),
    ],
)
def test_what_cannot_be_expanded_is_named(text, message):
    with pytest.raises(UserError) as error:
        load_config(None, [f"run.folder={text}"])
    assert str(error.value).startswith(message)


# --------------------------------------------------------------------------------------------------
# YAML


def test_every_path_of_the_configuration_is_found():
    assert {
        "run.folder",
        "data.shards",
        "data.index",
        "data.cache",
        "score.reference",
        "score.extractor",
        "score.vae",
    } <= set(PATH_FIELDS)


@pytest.mark.parametrize("field", PATH_FIELDS)
def test_in_yaml_in_overrides_and_in_what_is_resolved(tmp_path, field):
    section, name = field.split(".")
    (tmp_path / "c.yaml").write_text(f"{section}: {{{name}: '~/$NAME'}}\n")
    expected = f"{tmp_path}/home/run_7"
    for config in (
        load_config(tmp_path / "c.yaml"),
        load_config(None, [f"{field}=~/${{NAME}}"]),
        load_config(None, [f"{section}={{{name}: ~/$NAME}}"]),
        override(Config(), [f"{field}=$HOME/$NAME"]),
    ):
        assert config_to_tree(config)[section][name] == expected
        assert load_config(None, [f"{field}={expected}"]) == config


def test_what_a_checkpoint_has_is_not_read_again():
    """Its paths were read where it was written, and may be of another machine."""
    kept = config_from_tree({"data": {"shards": "$UNSET/~"}})
    assert kept.data.shards == override(kept, ["sample.steps=3"]).data.shards == "$UNSET/~"


def test_includes(tmp_path, monkeypatch):
    (tmp_path / "scratch/base.yaml").write_text("train: {steps: 7}\n")
    (tmp_path / "home/top.yaml").write_text("include: [$SCRATCH/base.yaml]\n")
    (tmp_path / "home/beside.yaml").write_text("include: top.yaml\n")
    for path in ("~/top.yaml", "$HOME/beside.yaml"):
        assert load_config(path).train.steps == 7
    (tmp_path / "home/lost.yaml").write_text("include: $UNSET/base.yaml\n")
    with pytest.raises(
        UserError,
        match=r"lost\.yaml: include \(\$UNSET/base\.yaml\) names \$UNSET, which is not set",
    ):
        load_config("~/lost.yaml")


# -----------------------------------------------------------------------------------------------
# command lines


def parsers(monkeypatch) -> dict[str, argparse.ArgumentParser]:
    """The parser of every verb that has one."""
    found = {}

    def stop(parser, *_args, **_kwargs):
        found[parser.prog] = parser
        raise InterruptedError

    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", stop)
    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_intermixed_args", stop)
    import diffmoe.__main__ as run

    verbs = [(verb,) for verb in run.SUBCOMMANDS if verb != "bench"]
    for verb, *kind in [
        *verbs,
        *(
            ("bench", kind)
            for kind in ("data", "checkpoint", "step", "sampling", "moe-layer", "communication")
        ),
    ]:
        with pytest.raises(InterruptedError):
            run._main_of(verb)(kind, ALONE)
    for verb in LAUNCHER_SUBCOMMANDS:
        with pytest.raises(InterruptedError):
            importlib.import_module(f"launcher.{verb}").main(["after"] if verb == "job" else [])
    return found


def test_every_option_of_every_verb_is_expanded(monkeypatch, tmp_path):
    """Whatever the option is: no verb has a parser of its own kind, and no option a type of its own
    that reads a path.
    """
    found = parsers(monkeypatch)
    assert len(found) >= 18 and {"run.py train", "run.py encode", "python -m launcher plan"} <= set(
        found
    )
    paths = 0
    for name, parser in found.items():
        assert isinstance(parser, PathParser), name
        for action in parser._actions:
            if action.type in (None, str, Path) and action.nargs != 0 and action.choices is None:
                paths += 1
                assert str(parser._get_value(action, "~/$NAME")) == f"{tmp_path}/home/run_7", (
                    name,
                    action.dest,
                )
                with pytest.raises(
                    argparse.ArgumentError,
                    match=r"path \(\$UNSET\) names \$UNSET, which is not set",
                ):
                    parser._get_value(action, "$UNSET")
                assert parser._get_value(action, "pipe:cat $UNSET") in (
                    "pipe:cat $UNSET",
                    Path("pipe:cat $UNSET"),
                )
                assert (
                    str(parser._get_value(action, "data.shards=$UNSET")) == "data.shards=$UNSET"
                ), "load_config's to read"
            elif action.type is not None and action.dest != "storage":  # a name of a data type
                with pytest.raises((argparse.ArgumentError, UserError)):
                    parser._get_value(action, "~/a path is not for it")
    assert paths > 40


def test_every_help_says_the_defaults_and_ends_with_an_example_of_its_own_options(monkeypatch):
    for name, parser in parsers(monkeypatch).items():
        text = " ".join(parser.format_help().split())
        for action in parser._actions:
            if action.option_strings and action.default not in (None, False, "==SUPPRESS==", []):
                about = text.partition(f" {action.option_strings[0]} ")[2]
                assert "default" in about and action.help, (name, action.dest)
        known = {option for action in parser._actions for option in action.option_strings}
        examples = re.findall(r"(?:run\.py|-m launcher) (.*)", parser.epilog)
        words = {word.partition("=")[0] for line in examples for word in line.split()}
        assert examples and {word for word in words if word.startswith("--")} <= known, name


def test_a_dry_run_shows_what_was_meant(tmp_path, capsys):
    import yaml

    from diffmoe.commands.train import main

    (tmp_path / "home/c.yaml").write_text(
        yaml.safe_dump({**TINY, "parallel": {"ep": 1}, "data": {"shards": "$SCRATCH/shards"}})
    )
    assert main(["--dry-run", "--config", "~/c.yaml", "run.folder=~/runs/${NAME}"], ALONE) == 0
    said = capsys.readouterr().out
    assert (
        f"folder: {tmp_path}/home/runs/run_7\n" in said
        and f"shards: {tmp_path}/scratch/shards\n" in said
    )
    with pytest.raises(
        UserError,
        match=r"argument --config: path \(\$UNSET/c.yaml\) names \$UNSET, which is not set.* \(see "
        r"run.py train --help\)",
    ):
        main(["--dry-run", "--config", "$UNSET/c.yaml"], ALONE)


def test_a_job_is_prepared_where_it_was_meant(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    (tmp_path / "scratch/d.json").write_text('{"zero_optimization": {"stage": 1}}')
    assert (
        launcher_main(
            [
                "job",
                "prepare",
                "--config",
                "configs/demo.yaml",
                "--deepspeed_config",
                "$SCRATCH/d.json",
                "--ranks",
                "2",
                "run.folder=~/r",
            ]
        )
        == 0
    )
    assert capsys.readouterr().out == f"{tmp_path}/home/r/jobs/12\n"
    assert load_config("~/r/jobs/12/config.yaml").run.folder == f"{tmp_path}/home/r"
    assert (
        launcher_main(
            [
                "submit",
                "--dry-run",
                "--config",
                "configs/demo.yaml",
                "--gpus-per-node",
                "2",
                "run.folder=$SCRATCH/r",
            ]
        )
        == 0
    )
    assert f"run.folder={tmp_path}/scratch/r" in capsys.readouterr().out
    assert launcher_main(["plan", "--config", "~/none.yaml"]) == 2
    assert f"config file {tmp_path}/home/none.yaml does not exist" in capsys.readouterr().err


def test_data_and_checkpoints_are_found(tmp_path, monkeypatch):
    """Verbs whose paths are plain texts."""
    from diffmoe.commands import check_checkpoint, inspect_data

    (tmp_path / "home/digits").symlink_to(digits())
    assert inspect_data.main(["--quick", "--grid", "~/grid.png", "~/digits"], ALONE) == 0
    assert (tmp_path / "home/grid.png").is_file()
    with pytest.raises(UserError, match=f"{tmp_path}/scratch/none"):
        check_checkpoint.main(["$SCRATCH/none"], ALONE)
    assert Parser("x").parse_args([]) == argparse.Namespace()


@pytest.mark.parametrize("module", ["diffmoe.data.digits", "diffmoe.evaluation.judge"])
@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("$UNSET/x", "names $UNSET, which is not set"),
        ("~nobody-of-that-name/x", "is no user of this machine"),
        ("$SCRATCH/other", "SCRATCH/other"),
    ],
)
def test_the_demos_own_commands_expand_too_and_say_what_is_wrong_in_one_line(
    tmp_path, monkeypatch, capsys, module, path, message
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "scratch/other").mkdir()
    (tmp_path / "scratch/other/index.json").write_text("{}")
    assert importlib.import_module(module).main([path]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1, said
    assert message.replace("SCRATCH", str(tmp_path / "scratch")) in said, said
    assert {entry.name for entry in tmp_path.iterdir()} == {"home", "scratch"}
