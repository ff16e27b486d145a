"""The queue in front of the model: what ends one job ends no other, and few pictures are in memory at a time."""

import asyncio
import gc
import weakref
from typing import Any

import numpy as np
import pytest

pytest.importorskip("fastapi", reason="serving needs the extra `ward`")

from pmclip_deploy.errors import InputError
from pmclip_deploy.serve.model import Model
from pmclip_deploy.serve.problems import Problem

THREADS, AHEAD = 1, 2


async def _stays() -> bool:
    return False


async def _breaks() -> bool:
    raise Problem(408, "slow", "the request's body took too long")


async def _picture() -> Any:
    return np.zeros((8, 8), np.uint8)


def _model(timeout_s: float = 20) -> Model:
    model = Model(None, THREADS, AHEAD, timeout_s)  # type: ignore[arg-type]  # the work below asks no predictor
    model.open()
    return model


def test_a_job_that_fails_ends_alone() -> None:
    async def scenario() -> None:
        model = _model()
        for _ in range(THREADS + AHEAD + 1):  # more than there are loops
            with pytest.raises(Problem):
                await model.run(_picture, lambda _, picture: picture, _breaks)
        assert await asyncio.wait_for(model.run(_picture, lambda _, picture: picture.shape, _stays), 5) == (8, 8)
        model.close()

    asyncio.run(scenario())


def test_few_pictures_are_read_ahead_of_the_model() -> None:
    async def scenario() -> None:
        model, held, most = _model(), list[weakref.ref[Any]](), list[int]()

        async def read() -> Any:
            picture = await _picture()
            held.append(weakref.ref(picture))
            most.append(sum(reference() is not None for reference in held))
            await asyncio.sleep(0)
            return picture

        await asyncio.gather(*(model.run(read, lambda _, picture: picture.sum(), _stays) for _ in range(20)))
        assert max(most) <= THREADS + AHEAD
        model.close()

    asyncio.run(scenario())


def test_an_answered_picture_is_not_kept() -> None:
    async def scenario() -> None:
        model, held = _model(), list[weakref.ref[Any]]()

        async def read() -> Any:
            picture = await _picture()
            held.append(weakref.ref(picture))
            return picture

        def refuse(_: Any, picture: Any) -> None:
            raise InputError(f"a picture of {picture.shape}", "give another one")

        gc.disable()
        await model.run(read, lambda _, picture: picture.sum(), _stays)
        with pytest.raises(InputError):
            await model.run(read, refuse, _stays)
        await asyncio.sleep(0.05)  # until the thread has left its job
        gc.enable()
        assert [reference() for reference in held] == [None, None]
        model.close()

    asyncio.run(scenario())


def test_a_job_whose_time_is_over_is_not_read() -> None:
    async def scenario() -> None:
        model, read = _model(timeout_s=-1), list[int]()

        async def count() -> None:
            read.append(1)

        with pytest.raises(Problem) as late:
            await model.run(count, lambda _, picture: picture, _stays)
        assert late.value.status_code == 504 and not read and model.dropped == 1
        model.close()

    asyncio.run(scenario())
