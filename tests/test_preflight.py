"""Preflight: what it finds on ranks that play several nodes, and how it judges what they report."""

import json
import re
import shutil
import sys

import pytest

from diffmoe import gpus
from diffmoe.config import load_config
from diffmoe.errors import UserError
from launcher.preflight import Expected, blame, exclude_line, figures, judge, main
from launcher.probe import Links, Report, rounds, shard_problems
from programs import REPOSITORY, Program, digits

VERSIONS = {"torch": "2.13.0", "code": "aa"}


@pytest.fixture(scope="module")
def played(tmp_path_factory):
    """What each case's ranks returned and said."""
    folder = tmp_path_factory.mktemp("preflight")
    for name in ("good", "own"):
        shutil.copytree(digits(), folder / name / "data/digits")
    (folder / "bad").mkdir()
    with Program(
        [sys.executable, str(REPOSITORY / "tests/preflight_ranks.py"), str(folder)], 4
    ) as program:
        ends = program.wait(200)
    assert all(end.returncode == 0 for end in ends), ends
    record = json.loads((folder / "record").read_text())
    assert [(row["rank"], row["host"]) for row in record] == [(i, f"node{i}") for i in range(4)]
    assert all(row["GB/s to another node"] > 0 for row in record)
    return {
        path.name.split(".")[0]: [
            json.loads((folder / f"{path.name.split('.')[0]}.{rank}.json").read_text())
            for rank in range(4)
        ]
        for path in folder.glob("*.0.json")
    }


def assert_found(ranks, exclude, *texts, codes=(1, 1, 1, 1)):
    said = ranks[0]["said"]
    assert tuple(rank["code"] for rank in ranks) == codes, said
    assert [line for line in said.splitlines() if line.startswith("--exclude")] == (
        [f"--exclude={exclude}"] if exclude else []
    ), said
    for text in texts:
        assert text in said


def test_a_record_has_each_ranks_slowest_links():
    reports = [Report(i, "ab"[i // 2], VERSIONS, (), speed=6e14 * (i < 3)) for i in range(4)]
    links = Links({("a", "b"): 40.0}, {(0, 1): 300.0, (2, 3): 200.0})
    rows = figures(reports, links)
    assert rows[1] == {
        "rank": 1,
        "host": "a",
        "TFLOP/s": 600.0,
        "GB/s to another node": 40.0,
        "GB/s inside the node": 300.0,
    }
    assert rows[3] == {
        "rank": 3,
        "host": "b",
        "GB/s to another node": 40.0,
        "GB/s inside the node": 200.0,
    }
    with pytest.raises(UserError, match=r"--record \(.*/nowhere/x\): its folder does not exist"):
        main(["--record", "nowhere/x"])


@pytest.mark.full
def test_healthy_nodes_pass(played):
    assert_found(
        played["healthy"],
        None,
        "4 nodes, 4 ranks",
        "6 pairs swap at",
        "all-reduce",
        "all-to-all",
        "nothing wrong",
        codes=(0,) * 4,
    )
    assert [rank["said"] for rank in played["healthy"][1:]] == ["", "", ""]


@pytest.mark.full
def test_ep_groups_that_span_nodes_are_measured_beside_the_inside_of_one(played):
    measured = r"^  experts   all-to-all of EP groups, GB/s a rank: over hosts [\d.e+-]+"
    said = played["healthy"][0]["said"]  # four nodes of one rank: none has an inside
    assert re.search(measured + "$", said, re.M), said
    assert "  experts   EP groups of 2 ranks span 2 hosts: by the plan (one CPU core" in said
    said = played["spanning"][0]["said"]
    assert re.search(measured + r", inside a host [\d.e+-]+$", said, re.M), said
    assert (
        "  experts   EP groups of 4 ranks span 2 hosts" in said
        and "with parallel.ep=2, inside hosts" in said
    )
    assert "experts" not in played["inside"][0]["said"]
    assert_found(
        played["slow_experts"],
        "node0,node1",
        "wrong     all-to-all of EP groups: ",
        "GB/s a rank, 1e+06 expected",
    )


@pytest.mark.full
def test_another_version_on_one_node(played):
    assert_found(
        played["versions"],
        "node1",
        "node1: torch is 2.12.0, elsewhere 2.13",
        "node1: code is 0123456789ab",
    )


@pytest.mark.full
def test_a_slow_link_is_blamed_on_the_node_that_all_slow_pairs_share(played):
    assert_found(
        played["link"],
        "node2",
        "node node0 - node node2",
        "node node1 - node node2",
        "node node2 - node node3",
    )


@pytest.mark.full
def test_a_node_without_the_shards(played):
    assert_found(played["shards"], "node3", "node3: shards: data folder")


@pytest.mark.full
def test_a_clock_that_is_off(played):
    assert_found(played["clock"], "node2", "node2: its clock is +90 s off")


@pytest.mark.full
def test_a_run_folder_that_is_not_shared(played):
    assert_found(
        played["own_disk"],
        "node0",
        "the run folder is not shared: node1, node2, node3 see no file that node0 writes there",
    )


@pytest.mark.full
def test_a_node_that_does_not_come(played):
    assert_found(
        played["absent"], "node3", "ranks 3 of 4 did not come within 3 s: node3", codes=(1, 1, 1, 0)
    )


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        (["shards=whole"], None),
        (["shards=whole/shard-00000{0..1}.tar"], None),
        (["shards=pipe:cat whole/shard-000001.tar", "index=whole/index.json"], None),
        (
            ["shards=pipe:cat elsewhere/shard-000001.tar", "index=whole/index.json"],
            "command ended with exit status 1",
        ),
        (["shards=http://127.0.0.1:9/set"], "http://127.0.0.1:9/set/index.json cannot be read"),
        (["shards=torn"], "shard shard-000001.tar is missing from"),
        (["shards=torn", "on_bad_shard=skip"], None),
    ],
)
def test_shards_are_looked_for_where_the_run_will_look(tmp_path, monkeypatch, settings, complaint):
    monkeypatch.setattr("diffmoe.files.TRIES", 1)
    monkeypatch.chdir(tmp_path)
    for name in ("whole", "torn"):
        shutil.copytree(digits(), tmp_path / name)
    (tmp_path / "torn/shard-000001.tar").unlink()
    found = shard_problems(
        load_config(None, [f"data.{setting}" for setting in settings]).data, tmp_path
    )
    assert found == [] if complaint is None else complaint in found[0]


def report(rank, host=None, **fields):
    return Report(
        rank,
        host or f"n{rank}",
        fields.pop("versions", VERSIONS),
        fields.pop("problems", ()),
        **fields,
    )


def links(nodes, slow=(), speed=50.0):
    return Links(
        {
            (f"n{a}", f"n{b}"): (1.0 if a in slow or b in slow else speed)
            for a in range(nodes)
            for b in range(a + 1, nodes)
        }
    )


def test_what_all_nodes_say_excludes_none_of_them():
    wrong = ("shards: data folder (data) does not exist",)
    found = judge([report(rank, problems=wrong) for rank in range(3)], Links(), Expected(), "cpu")
    assert [(problem.hosts, problem.text) for problem in found] == [
        ((), f"all nodes: {wrong[0]}")
    ] and exclude_line(found) is None
    found = judge(
        [report(0), report(1, problems=wrong), report(2, problems=wrong)],
        Links(),
        Expected(),
        "cpu",
    )
    assert [problem.text for problem in found] == [f"n{rank}: {wrong[0]}" for rank in (1, 2)]


def test_blame_takes_the_fewest_ends_that_explain_slow_links():
    assert blame([]) == set()
    assert blame([("a", "b")]) == {"a", "b"}  # nobody can tell which
    assert blame([("a", "b"), ("a", "c"), ("a", "d"), ("e", "b"), ("e", "c")]) == {"a", "e"}


@pytest.mark.parametrize(
    ("slow", "expected", "exclude"),
    [
        ((), Expected(), None),
        ((3,), Expected(), "--exclude=n3"),
        ((1, 4), Expected(), "--exclude=n1,n4"),
        ((), Expected(between_nodes=90), None),
        ((), Expected(between_nodes=400), "--exclude=n0,n1,n2,n3,n4,n5"),
    ],
)
def test_links_against_each_other_or_what_was_told(slow, expected, exclude):
    found = judge([report(rank) for rank in range(6)], links(6, slow), expected, "cuda")
    line = exclude_line(found)
    if (
        expected.between_nodes == 400
    ):  # every link is slow: greed leaves one node, and everybody is named in the lines
        assert len(found) == 15 and line is not None
    else:
        assert line == exclude


def test_two_nodes_with_one_slow_link_need_an_expectation():
    pair = Links({("n0", "n1"): 1.0}, whole={"all-to-all": 1.0})
    assert judge([report(0), report(1)], pair, Expected(), "cuda") == []
    found = judge([report(0), report(1)], pair, Expected(between_nodes=40), "cuda")
    assert exclude_line(
        found
    ) == "--exclude=n0,n1" and "all-to-all of all ranks: 1 GB/s a rank, 40 expected" in [
        p.text for p in found
    ]


def test_slow_and_missing_gpus():
    speeds = [700e12, 720e12, 300e12, 710e12]
    found = judge(
        [report(rank, speed=speed) for rank, speed in enumerate(speeds)],
        Links(),
        Expected(),
        "cuda",
    )
    assert [problem.text for problem in found] == [
        "n2: the GPU of rank 2 computes 300 TFLOP/s, others 705"
    ]
    kinds = ["H200", "H200", "cpu"]
    found = judge(
        [report(rank, versions={"device": kind}) for rank, kind in enumerate(kinds)],
        Links(),
        Expected(),
        "cuda",
    )
    assert exclude_line(found) == "--exclude=n2"


def test_what_nvidia_smi_says():
    ok, hot, broken = gpus.parse(
        "0, NVIDIA H200, 570.1, 143771, 34, 0, 0x0000000000000004\n1, NVIDIA H200, 570.1, 143771, "
        "91, [N/A], "
        "0x0000000000000060\n2, NVIDIA H200, 570.1, 143771, 40, 3, 0x0000000000000001\n"
    )
    assert (ok.problems, ok.memory, ok.driver) == ((), 143771, "570.1")
    assert hot.problems == (
        "software thermal slowdown at 91 C",
        "hardware thermal slowdown at 91 C",
    )
    assert broken.problems == ("3 uncorrected ECC errors",)
    with pytest.raises(UserError, match="which is not 7 fields"):
        gpus.parse("No devices were found")


@pytest.mark.parametrize("count", range(1, 9))
def test_rounds_let_everybody_meet_once_and_nobody_play_twice(count):
    played = rounds(count)
    assert all(len({end for pair in pairs for end in pair}) == 2 * len(pairs) for pairs in played)
    assert sorted(pair for pairs in played for pair in pairs) == [
        (a, b) for a in range(count) for b in range(a + 1, count)
    ]


def test_rounds_of_many_nodes_are_few():
    played = rounds(512)
    assert len(played) == 15 and all(len(pairs) == 256 for pairs in played)
