"""docs/demo.ipynb runs from its first cell to its last."""

import json

import matplotlib
import matplotlib.pyplot as plt
import pytest

from programs import REPOSITORY, trained


@pytest.fixture
def cells():
    notebook = json.loads((REPOSITORY / "docs/demo.ipynb").read_text())
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


@pytest.mark.full
def test_every_cell_runs(cells, monkeypatch):
    matplotlib.use("Agg")
    drawn = []
    monkeypatch.setattr(plt, "show", lambda: drawn.append(plt.gcf().number))
    names = {}
    for cell in cells:
        exec("".join(cell["source"]), names)
        if "parameters" in cell["metadata"].get("tags", ()):
            names["checkpoint"] = trained()[0]  # for the demo's run
    plt.close("all")
    assert len(set(drawn)) == 5
    assert names["out"].labels == [number for number in range(10) for _ in range(10)]
    used = [made.capacity for made in names["swept"]]
    assert all(first < second for first, second in zip(used, used[1:])), used


def test_it_is_kept_with_its_images(cells):
    images = [
        output
        for cell in cells
        for output in cell["outputs"]
        if "image/png" in output.get("data", {})
    ]
    assert len(images) == 5
    assert not [
        output
        for cell in cells
        for output in cell["outputs"]
        if output["output_type"] in ("error", "stream")
    ]
