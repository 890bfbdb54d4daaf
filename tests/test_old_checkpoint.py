"""A checkpoint that the program of November 2026 wrote (2 ranks, EP 2, ZeRO 1, step 4 on the
digits) stays readable.
"""

import hashlib
import shutil

import pytest

from diffmoe.checkpoints.reader import Checkpoint
from diffmoe.models.pretrained import open_pretrained
from programs import digits, losses, run_cases
from reference_models import DATA

KEPT = DATA / "checkpoint_2026_11"
DIGESTS = {
    "master": "789b40633ac8d09663ddda1446bb60633f5fea14f49c1863b80d42b409a43d09",
    "exp_avg": "bb8bb5ffdf2ff59c737282f9ac76586406dd36a62e5bb7be04f310fd1abd5c54",
    "exp_avg_sq": "68b782d260d1d98d7943bfca0e86c054760639506de733cff177f5dbce7008ff",
    "ema_0.7": "b2ecff3cf4422cc81eb067f9c936935eb3640e76a65070e8867d351096d8d52a",
    "buffers": "bf9d88110c042d032f93640317da4f142dff016c8d180a3f4d5eb689140dfe3a",
}


def digest(tensors):
    value = hashlib.sha256()
    for name in sorted(tensors):
        value.update(name.encode())
        value.update(tensors[name].numpy().tobytes())
    return value.hexdigest()


@pytest.mark.parametrize("kind", DIGESTS)
def test_its_tensors_are_what_was_written(kind):
    checkpoint = Checkpoint(KEPT / "step_00000004")
    assert set(checkpoint.kinds()) == set(DIGESTS) and (
        checkpoint.step,
        checkpoint.samples,
        checkpoint.pool,
    ) == (4, 32, 8)
    assert digest(checkpoint.tensors(kind)) == DIGESTS[kind]


def test_it_is_checked_sampled_exported_and_trained_on(tmp_path):
    """On 1 rank and EP 1 where 2 and EP 2 wrote it; its data are the digits, whose fingerprint it
    holds.
    """
    run = tmp_path / "run"
    shutil.copytree(KEPT, run / "checkpoints")
    step, config = run / "checkpoints/step_00000004", tmp_path / "old.yaml"
    config.write_text("""
model:
  {family: diffmoe, input_size: 8, channels: 1, width: 8, depth: 2, heads: 2, classes: 10,
   learn_sigma: false}
moe: {experts: 2, pool: 8}
train: {steps: 6, batch: 8, lr: 0.01, warmup: 2, ema: 0.7, log_every: 1, save_every: 4}
sample: {steps: 2, columns: 4}
""")
    train = ["--config", config, f"run.folder={run}", f"data.shards={digits()}", "parallel.ep=1"]
    results = [
        case[0]
        for case in run_cases(
            1,
            [
                ["check-checkpoint", step],
                ["sample", "--checkpoint", step, "--count", "4", "--out", tmp_path / "samples"],
                *(
                    ["export", "--checkpoint", step, "--format", form, "--out", tmp_path / form]
                    for form in ("research", "hf")
                ),
                train,
            ],
        )
    ]
    assert [result.returncode for result in results] == [0] * 5, results
    checked, sampled, _, _, trained = (result.stdout for result in results)
    assert f"{step}: step 4, " in checked, checked
    assert (
        "4 images" in sampled
        and (tmp_path / "research").stat().st_size > 0
        and open_pretrained(tmp_path / "hf").model()
    )
    assert "at step 4" in trained and set(losses(run)) == {5, 6}
    assert Checkpoint(run).step == 6 and Checkpoint(run).samples == 48
