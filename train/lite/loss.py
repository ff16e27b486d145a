"""The loss that pmclip-lite's head and image tower are trained by."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from pmclip_deploy.train.clip.embeddings import Captions, loss_among_all, pooled_from_text
from pmclip_deploy.train.contrastive import scale_of
from pmclip_deploy.train.cpu import autocast
from pmclip_deploy.train.heads.lite import unit
from pmclip_deploy.train.images import Images, radiology_augmented
from pmclip_deploy.train.lite.model import Model, Source
from pmclip_deploy.train.lite.rows import Rows

CONTRASTIVE_WEIGHT = 0.3  # keeps image and text embeddings aligned while the tower learns to answer
RADIOGRAPH_WEIGHT = 0.3
OTHERS_SHARE = 6  # so many of radiology come with one that is no radiology in a batch
KINDS = 96  # texts whose kind is learned in a step


@dataclass(frozen=True)
class Texts:
    """Every text once, through the locked transformer."""

    pooled: Tensor  # (N, W) f32
    kind: Tensor  # (N,) i64
    of_kind: list[Tensor]  # the texts of each kind
    ways: dict[int, Tensor]  # of a finding's kind, the texts that ask about it

    @classmethod
    def of(cls, rows: Rows, source: Source, device: torch.device) -> "Texts":
        kind = torch.tensor(rows.kinds)
        of_kind = [torch.nonzero(kind == k).squeeze(1) for k in range(len(rows.vocabulary.kinds))]
        ways = {k: torch.tensor(ids) for k, ids in rows.ways.items()}
        return cls(pooled_from_text(source.towers, source.tokenizer, list(rows.texts)).to(device), kind, of_kind, ways)


@dataclass(frozen=True)
class Step:
    """Cross-entropy over the answers that the question's kind allows, cross-entropy of the kind, the contrastive loss, and whether an image
    is one of radiology.

    From the epoch ``rounded_from`` on the image tower computes with INT8's roundings.
    """

    model: Model
    source: Source
    rows: Rows
    texts: Texts
    captions: Captions
    images: Images
    others: Sequence[Tensor]
    allowed: Tensor  # (kinds, trained answers) bool
    rounded_from: int
    device: torch.device
    mixed: bool = True  # bf16 where the device computes in it

    def __call__(self, indices: Tensor, generator: Generator, epoch: int) -> Tensor:
        self.model.train()
        self.source.visual.on = epoch >= self.rounded_from
        for module in self.source.locked:
            module.eval()
        every, count = self._embeddings(indices, generator), len(indices)
        floats, embedding = every.float(), every[:count].float()
        radiograph = self._radiograph_loss(floats, count)
        answers = self._answer_loss(embedding, indices, generator)
        kinds = self._kind_loss(generator)
        towers = self.model.clip
        told = towers.projected_text(self.captions.drawn(generator))
        pairs = loss_among_all(embedding, told, indices.to(self.device), scale_of(towers.logit_scale))
        return answers + kinds + CONTRASTIVE_WEIGHT * pairs + RADIOGRAPH_WEIGHT * radiograph

    def _embeddings(self, indices: Tensor, generator: Generator) -> Tensor:
        """(B + B / OTHERS_SHARE, D): of the images, then of pictures that are no radiology; in bf16 where the tower computes in it.

        What takes them makes floats of them: gradients are summed in the tower's own precision, which the weights depend on.
        """
        preprocess = self.source.spec.preprocess
        strange = torch.randint(len(self.others), (len(indices) // OTHERS_SHARE,), generator=generator)
        unlike = torch.stack([self.others[i].expand(3, -1, -1) for i in strange])
        shown = torch.cat([self.images.augmented(indices, generator), radiology_augmented(unlike, preprocess, generator)])
        with autocast(self.device, self.mixed):
            return self.source.visual(shown.to(self.device, memory_format=torch.channels_last))

    def _radiograph_loss(self, every: Tensor, count: int) -> Tensor:
        """Of ``every`` the first ``count`` are of radiology."""
        logits = self.model.head.radiograph(unit(every)).squeeze(-1)
        return F.softplus(-logits[:count]).mean() + F.softplus(logits[count:]).mean()

    def _answer_loss(self, embedding: Tensor, indices: Tensor, generator: Generator) -> Tensor:
        where, text, kind, answer, weight = self.rows.batch(indices.tolist())
        for k, ids in self.texts.ways.items():  # a derived question is put in another way each time
            asked = (text < 0) & (kind == k)
            text[asked] = ids[torch.randint(len(ids), (int(asked.sum()),), generator=generator)]
        where, text, kind, answer, weight = (x.to(self.device) for x in (where, text, kind, answer, weight))
        logits = self.model.head.trained(embedding[where], self.model.clip.projected_text(self.texts.pooled[text]))
        losses = F.cross_entropy(logits.masked_fill(~self.allowed[kind], -1e4), answer, reduction="none")
        return (losses * weight).sum() / len(indices)

    def _kind_loss(self, generator: Generator) -> Tensor:
        of_kind = self.texts.of_kind
        kinds = torch.randint(len(of_kind), (KINDS,), generator=generator).tolist()
        drawn = torch.stack([of_kind[k][torch.randint(len(of_kind[k]), (), generator=generator)] for k in kinds])
        logits = self.model.head.kind(unit(self.model.clip.projected_text(self.texts.pooled[drawn])))
        return F.cross_entropy(logits, self.texts.kind[drawn].to(self.device))
