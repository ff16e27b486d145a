"""What stage "training" of `benchmarks.gpu` trains: models with random weights, and the steps that our commands take with them."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from pmclip_deploy.benchmarks.gpu_stage import Stage
from pmclip_deploy.benchmarks.gpu_towers import backbone_of
from pmclip_deploy.benchmarks.peers import LITE

WIDTH = 512  # of embeddings
SIDE = 288  # pixels of a JPEG's sides
ANSWERS = 460, 60  # QCR's open and closed ones on VQA-RAD, about
WORDS, VECTOR = 1200, 300  # of the questions' dictionary and of a GloVe vector


class Trainee:
    """A backbone with random weights, its step and its optimiser, as `train clip --from` has them."""

    def __init__(self, stage: Stage, name: str, recipe: str, device: str, **chosen: Any) -> None:
        import torch

        from pmclip_deploy.train.clip.pairs import Step
        from pmclip_deploy.train.clip.recipes import recipe_named

        torch.manual_seed(0)
        self.recipe, self.spec, self.device = recipe_named(recipe, **chosen), backbone_of(stage, name), torch.device(device)
        self.model = self.spec.build().to(self.device)
        self.step = Step(self.model, [], self.spec, self.recipe, self.device)
        self.optimiser = self.recipe.optimiser.of([([*self.model.parameters()], self.recipe.learning_rate)])

    def __call__(self, batch: tuple[Any, Any]) -> float:
        """One step; returns its loss."""
        import torch

        loss = self.step(batch, torch.Generator().manual_seed(0), 0)
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        self.optimiser.step()
        return float(loss.detach())

    def batch(self, pairs: int, device: str = "cpu") -> tuple[Any, Any]:
        """Random pixels and tokens, made on this device: another one gives other numbers."""
        import torch

        size, generator = self.spec.preprocess.size, torch.Generator(device).manual_seed(pairs)
        pixels = torch.randn(pairs, 3, size, size, generator=generator, device=device)
        return pixels, self.tokens(pairs).to(device)

    def tokens(self, texts: int, length: int = 24) -> Any:
        import torch

        made = torch.full((texts, self.spec.context_length), self.spec.pad_id)
        made[:, :length] = torch.randint(1000, 30_000, (texts, length), generator=torch.Generator().manual_seed(texts))
        made[:, length - 1] = 30_001
        return made


class Small:
    """Steps of a training on random numbers: a subclass sets ``step``, ``batch``, ``trained`` and ``settings``."""

    step: Any
    batch: Any
    trained: list[Any]
    settings: Any
    optimiser: Any = None

    def __call__(self) -> float:
        import torch

        self.optimiser = self.optimiser or self.settings.optimiser.of([(self.trained, self.settings.learning_rate)])
        self.optimiser.zero_grad(set_to_none=True)
        loss = self.step(self.batch, torch.Generator().manual_seed(0), 0)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained, self.settings.optimiser.longest or float("inf"))
        self.optimiser.step()
        return float(loss.detach())


class Qcr(Small):
    """QCR's recipe at the paper's size, with pictures and questions of random numbers; a smaller head in a rehearsal.

    ``tower`` names the backbone that is trained with it.
    """

    def __init__(self, stage: Stage, frozen: bool, mixed: bool, tower: str | None = None, device: str | None = None) -> None:
        import torch

        from pmclip_deploy.train.heads import qcr as heads
        from pmclip_deploy.train.heads.answering import Inputs
        from pmclip_deploy.train.heads.mevf import HIDDEN
        from pmclip_deploy.train.heads.plan import settings_of_head
        from pmclip_deploy.train.heads.training import Encoded, Step
        from pmclip_deploy.train.heads.vision import AUTOENCODER_SIZE, CODE, AutoEncoder, ImageFeatures
        from pmclip_deploy.train.heads.words import LENGTH

        where = torch.device(device or stage.device)
        self.settings = settings_of_head("qcr", **({"batch_size": 4} if stage.is_rehearsal else {}))
        glimpses, hidden, images = (1, 32, 4) if stage.is_rehearsal else (heads.GLIMPSES, HIDDEN, 256)
        generator = torch.Generator().manual_seed(0)
        torch.manual_seed(0)
        table = torch.cat([torch.randn(WORDS, VECTOR, generator=generator), torch.zeros(1, VECTOR)])  # the last is the padding's
        opened, closed = ANSWERS
        spec = None if tower is None else backbone_of(stage, tower)
        towers = None if spec is None else spec.build().to(where)
        width = WIDTH if spec is None else spec.embed_dim
        self.model = heads.QCR(ImageFeatures(width, AutoEncoder()), [table, table], opened, closed, glimpses, hidden)
        grey = (images, CODE, AUTOENCODER_SIZE // 4, AUTOENCODER_SIZE // 4) if frozen else (images, 1, AUTOENCODER_SIZE, AUTOENCODER_SIZE)
        seen = (images, width) if spec is None else (images, 3, spec.preprocess.size, spec.preprocess.size)
        inputs = Inputs(torch.randn(seen, generator=generator), torch.rand(grey, generator=generator), None, towers)
        self.model.kind.requires_grad_(False)
        if frozen:
            self.model.features.autoencoder.requires_grad_(False)  # type: ignore[union-attr]
        asked = 8 * images
        is_open = torch.arange(asked) % 2 == 0
        labels = torch.where(is_open, closed, 0) + torch.randint(0, closed, (asked,), generator=generator)
        tokens = torch.randint(0, WORDS, (asked, LENGTH), generator=generator)
        questions = Encoded(torch.arange(asked) % images, tokens, labels, is_open)
        self.step = Step(self.model.to(where), inputs.to(where), questions.to(where), opened + closed, closed, mixed)
        self.batch = torch.randperm(asked, generator=generator)[: self.settings.batch_size]
        self.trained = [p for p in self.model.parameters() if p.requires_grad] + ([] if towers is None else [*towers.visual.parameters()])


class AutoEncoding(Small):
    def __init__(self, stage: Stage, mixed: bool, device: str | None = None) -> None:
        import torch

        from pmclip_deploy.train.autoencoder import Step
        from pmclip_deploy.train.heads.vision import AUTOENCODER_SIZE, AutoEncoder
        from pmclip_deploy.train.loop import Settings

        torch.manual_seed(0)
        where, count = torch.device(device or stage.device), 2 if stage.is_rehearsal else 32
        self.settings, self.batch, model = Settings(1, 1e-3, count), torch.arange(count), AutoEncoder().to(where)
        pixels = torch.randint(0, 255, (count, 1, AUTOENCODER_SIZE, AUTOENCODER_SIZE), dtype=torch.uint8)
        self.step, self.trained = Step(model, pixels, where, mixed), [*model.parameters()]


class Maml(Small):
    def __init__(self, stage: Stage, mixed: bool, device: str | None = None) -> None:
        import torch

        from pmclip_deploy.train import maml
        from pmclip_deploy.train.heads.vision import MAML_SIZE, MamlNetwork
        from pmclip_deploy.train.heads.vision import WIDTH as OUT
        from pmclip_deploy.train.loop import Settings

        torch.manual_seed(0)
        where, tasks = torch.device(device or stage.device), 1 if stage.is_rehearsal else 5
        model = torch.nn.Sequential(MamlNetwork(), torch.nn.Linear(OUT, maml.WAYS)).to(where)
        classes = [torch.randint(0, 255, (20, 1, MAML_SIZE, MAML_SIZE), dtype=torch.uint8) for _ in range(maml.WAYS)]
        self.settings, self.batch = Settings(1, 1e-3, tasks), torch.arange(tasks)
        self.step, self.trained = maml.Step(model, classes, where, mixed), [*model.parameters()]


class LiteClip(Small):
    """`train clip` without --from, on pictures of noise that were read before."""

    def __init__(self, stage: Stage, mixed: bool, device: str | None = None) -> None:
        import torch

        from pmclip_deploy.train.clip.embeddings import VARIANTS, Captions
        from pmclip_deploy.train.clip.questions import Step, locked_and_fast
        from pmclip_deploy.train.images import Images
        from pmclip_deploy.train.loop import Settings

        torch.manual_seed(0)
        where, count, spec = torch.device(device or stage.device), 2 if stage.is_rehearsal else 48, backbone_of(stage, LITE)
        model = spec.lite(spec.build())
        locked = locked_and_fast(model)
        with tempfile.TemporaryDirectory() as folder:
            images = Images(pictures(Path(folder), count), spec.preprocess)
        text = model.pooled_text(torch.ones(1, 4, dtype=torch.int64)).shape[1]
        captions = Captions(torch.randn(count, VARIANTS, text)).to(where)
        self.settings, self.batch = Settings(1, 5e-4, count), torch.arange(count)
        self.step = Step(model.to(where), locked, images, captions, where, mixed)
        self.trained = [*model.projections(), *model.trunk()]


def pictures(folder: Path, count: int) -> list[Path]:
    """Writes JPEGs of noise on a ramp, as large as a radiograph's is after it was scaled."""
    import numpy as np
    from PIL import Image

    rng, paths = np.random.default_rng(0), []
    ramp = np.linspace(0, 200, SIDE)[:, None]
    for i in range(count):
        path = folder / f"{i}.jpg"
        Image.fromarray((ramp + rng.integers(0, 56, (SIDE, SIDE))).astype(np.uint8)).save(path, quality=90)
        paths.append(path)
    return paths
