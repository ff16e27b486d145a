"""Several index files are searched as one: the merge is exact, no file is left out, and no wrong one comes in."""

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import pmclip_deploy as pm
from pmclip_deploy.errors import BundleError, DeviceError, PmclipError, UsageError
from pmclip_deploy.search.index import About, Halves, index_from_file, write_index
from pmclip_deploy.search.shards import Shards, shards_on_ray
from tests.command import Result, is_one_line
from tests.search.test_search import picture

ABOUT = About("tiny", "ab" * 32, "image", "path")
DIM = 5
RAY = pytest.mark.skipif(find_spec("ray") is None, reason="needs the extra `ray`")  # imported later: shards_on_ray says how it listens


def rows(count: int, seed: int, kinds: int) -> Halves:
    """Of few kinds, so that many have the same score; the first has no direction."""
    generator = np.random.default_rng(seed)
    wide = generator.normal(size=(kinds, DIM))
    wide /= np.linalg.norm(wide, axis=1, keepdims=True)
    wide[0] = 0
    return wide[generator.integers(0, kinds, count)].astype(np.float16)


def files(folder: Path, embeddings: Halves, cuts: Sequence[int]) -> list[Path]:
    names = [f"{row}.png" for row in range(len(embeddings))]
    ends = [*sorted(cuts), len(embeddings)]
    paths = [folder / f"{number}.index" for number in range(len(ends))]
    for path, start, end in zip(paths, [0, *ends], ends, strict=False):
        write_index(path, ABOUT, DIM, [(embeddings[start:end], names[start:end])])
    return paths


@given(st.data(), st.integers(0, 300), st.integers(1, 40), st.integers(0, 2**32 - 1))
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_matches_are_those_of_one_index(tmp_path: Path, data: st.DataObject, count: int, kinds: int, seed: int) -> None:
    """Scores to the last bit, and the order of equal ones."""
    embeddings = rows(count, seed, kinds)
    (whole,) = files(tmp_path, embeddings, [])
    query = np.random.default_rng(seed + 1).normal(size=DIM).astype(np.float32)
    k = data.draw(st.integers(1, count + 2))
    expected = index_from_file(whole).matches(query, k)
    cuts = data.draw(st.lists(st.integers(0, count), max_size=5))
    assert Shards(files(tmp_path, embeddings, cuts)).matches(query, k) == expected


def test_a_shard_of_other_rows_is_refused(tmp_path: Path) -> None:
    paths = files(tmp_path, rows(9, 0, 9), [3, 6])
    others = {"made with bundle tiny cdcd": replace(ABOUT, bundle_sha256="cd" * 32), "of kind uid": replace(ABOUT, ids="uid")}
    for said, other in others.items():
        write_index(paths[1], other, DIM, [(rows(3, 1, 9), ["a", "b", "c"])])
        with pytest.raises((BundleError, UsageError), match=rf"1\.index: .*{said}"):
            Shards(paths).matches(np.ones(DIM, np.float32), 3)


@pytest.fixture
def made(command: Callable[..., Result], bundle: Path, tmp_path: Path) -> tuple[Path, list[Path]]:
    """An index of an archive, and an index of each of its files."""
    pq = pytest.importorskip("pyarrow.parquet", reason="needs the extra `archive`")
    for seed in range(7):
        picture(tmp_path / "in" / f"p {seed}.png", seed % 4)
    out, shards = tmp_path / "out", [tmp_path / f"{n}.index" for n in range(3)]
    assert command("archive", "embed", tmp_path / "in", "--out", out, "--workers", "1", "--bundle", bundle).code == 0
    assert command("search", "index", out, "--output", tmp_path / "all.index").code == 0
    whole = pq.read_table(out / "part-00000.parquet")
    for number, shard in enumerate(shards):
        part = out / f"part-{number:05}.parquet"
        pq.write_table(whole.slice(3 * number, 3), part)
        assert command("search", "index", part, "--output", shard).out.endswith(f"{1 if number == 2 else 3} embedded\n")
    return tmp_path / "all.index", shards


def test_the_command(command: Callable[..., Result], bundle: Path, made: tuple[Path, list[Path]], tmp_path: Path) -> None:
    """An archive's parts, indexed one by one, and searched as one."""
    whole, shards = made
    asked = ("plane", "--k", "5", "--bundle", bundle)
    one, several = (command("search", "query", *paths, *asked, "--json").json for paths in ([whole], shards))
    assert several["matches"] == one["matches"] and len(one["matches"]) == 5 and {*several} == {*one}
    assert [each["path"] for each in several["index"]] == list(map(str, shards)) and one["index"]["rows"] == 7
    (tmp_path / "cut.index").write_bytes(shards[0].read_bytes()[:-1])
    for code, arguments, said in (
        (4, [shards[0], tmp_path / "cut.index", "plane"], "cut.index: not a usable index"),
        (2, [shards[0], "which", "plane"], 'one text in double quotes: "which plane"'),
        (2, [shards[0], "plane", "--engine", "dask"], "is unknown"),
        (2, [shards[0], "plane", "--ray-address", "127.0.0.1:1"], "is for --engine ray"),
        (2, [shards[0]], "Missing argument"),
    ):
        result = command("search", "query", *arguments, "--bundle", bundle)
        assert (result.code, result.out) == (code, "") and said in result.err and is_one_line(result.err), result.err


@RAY
@pytest.mark.nightly  # starts a Ray cluster
def test_actors_find_the_same(
    command: Callable[..., Result], bundle: Path, made: tuple[Path, list[Path]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also after one was killed. What an actor can no longer read is an error, never a smaller answer."""
    whole, shards = made
    predictor = pm.load(bundle)
    expected = predictor.search(whole, text="plane", k=5)
    with pytest.raises(BundleError, match="no such index"), shards_on_ray(shards) as opened:
        import ray

        assert {node["NodeManagerAddress"] for node in ray.nodes()} == {"127.0.0.1"}
        assert predictor.search(opened, text="plane", k=5) == expected
        for _ in range(2):
            for actor in opened._actors:  # type: ignore[attr-defined]
                os.kill(ray.get(actor.__ray_call__.remote(lambda _: os.getpid())), 9)
            assert predictor.search(opened, text="plane", k=5) == expected
            shards[1].rename(tmp_path / "gone")
    assert not capsys.readouterr().out  # of Ray


@RAY
@pytest.mark.nightly
def test_an_actor_that_ends_for_good_is_one_line(made: tuple[Path, list[Path]]) -> None:
    with pytest.raises(PmclipError, match="ray: ActorDiedError; run the same command again"), shards_on_ray(made[1]) as opened:
        import ray

        ray.kill(opened._actors[0])  # type: ignore[attr-defined]
        opened.to_json()


@RAY
@pytest.mark.nightly
def test_no_cluster(made: tuple[Path, list[Path]]) -> None:
    for address in ("127.0.0.1:1", "auto", "127.0.0.1:99999"):
        with pytest.raises(DeviceError, match="no Ray cluster took this process in"), shards_on_ray(made[1], address):
            pass
