"""What `train vqa --head mevf` and `qcr` train, and how: the options, checked, and the published recipes."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pmclip_deploy.bundle.files import sha256_of_file
from pmclip_deploy.errors import UsageError
from pmclip_deploy.train.heads import mevf, qcr
from pmclip_deploy.train.loop import Optimiser, Settings
from pmclip_deploy.train.splits import IMAGE_DISJOINT

FEATURES = ("clip", "maml", "ae")


@dataclass(frozen=True)
class Plan:
    """What is trained, beside the settings of the training: the paper's where nothing is said."""

    head: str  # of HEADS
    glove: Path
    features: tuple[str, ...] = ("clip", "ae")  # of FEATURES; none of them: the question alone
    autoencoder: Path | None = None
    maml: Path | None = None
    freeze_autoencoder: bool = False  # its code is then computed once, and not its reconstruction
    attention: str = "ban"  # MEVF's
    recurrent: str | None = None  # "gru" or "lstm", which reads the question; None: what PubMedCLIP's code has
    depth: int | None = None  # glimpses of BAN, stacks of SAN
    hidden: int = mevf.HIDDEN
    type_epochs: int = qcr.TypeRecipe.epochs  # of QCR's classifier of questions, before the rest
    fine_tune: bool = False  # the image tower is trained with the head, as in PubMedCLIP's code
    tower_learning_rate: float | None = None  # with it; None: the head's
    split: str = "official"
    split_seed: int = 1

    def check(self) -> None:
        """Raises UsageError."""
        if unknown := [name for name in self.features if name not in FEATURES]:
            raise UsageError(f"feature {unknown[0]!r} is unknown", "choose of clip, ae and maml, or none")
        for name, file in (("ae", self.autoencoder), ("maml", self.maml)):
            if (name in self.features) != (file is not None):
                option = "--autoencoder" if name == "ae" else "--maml"
                wanted = f"{name} in --features needs {option} FILE" if file is None else f"{option} is for {name} in --features"
                raise UsageError(f"{wanted}", f"`pmclip-deploy train {option[2:]}` makes one")
        if self.split not in ("official", IMAGE_DISJOINT):
            raise UsageError(f"split {self.split!r} is unknown", f"choose official or {IMAGE_DISJOINT}")
        if self.attention not in ("ban", "san"):
            raise UsageError(f"attention {self.attention!r} is unknown", "choose ban or san")
        if self.head == "qcr" and self.attention != "ban":
            raise UsageError("QCR has no --attention but ban")
        if self.recurrent not in (None, "gru", "lstm"):
            raise UsageError(f"recurrent {self.recurrent!r} is unknown", "choose gru or lstm")
        if self.head == "qcr" and self.recurrent == "lstm":
            raise UsageError("QCR has no --recurrent but gru")
        if self.fine_tune and "clip" not in self.features:
            raise UsageError("--fine-tune trains the image tower, which these --features leave out", "add clip to --features")
        if self.tower_learning_rate is not None and not self.fine_tune:
            raise UsageError("--tower-learning-rate needs --fine-tune", "add --fine-tune, or leave this option out")

    def to_json(self) -> dict[str, Any]:
        """What the weights depend on."""
        files = {"glove": self.glove, "autoencoder": self.autoencoder, "maml": self.maml}
        chosen = ["freeze_autoencoder", "attention", "hidden", "split", "split_seed", "fine_tune"]
        chosen += ["type_epochs"] * (self.head == "qcr") + ["tower_learning_rate"] * self.fine_tune
        return {
            "head": self.head,
            "features": list(self.features),
            **{name: getattr(self, name) for name in chosen},
            "depth": self.glimpses,
            "recurrent": self.reader,
            **{f"{name}_sha256": sha256_of_file(file) for name, file in files.items() if file is not None},
        }

    @property
    def reader(self) -> str:
        return self.recurrent or ("lstm" if self.head == "mevf" else "gru")

    @property
    def glimpses(self) -> int:
        return self.depth or (qcr.GLIMPSES if self.head == "qcr" else mevf.GLIMPSES if self.attention == "ban" else mevf.STACKS)


@dataclass(frozen=True)
class MevfOptimiser(Optimiser):
    """With MEVF's schedule by the epoch."""

    epochs: int = mevf.Recipe.epochs

    def rate(self, step: int, steps: int) -> float:
        return mevf.schedule(step * self.epochs // steps)


def settings_of_head(head: str, **chosen: Any) -> Settings:
    """The published recipe with ``chosen`` in place of its own values."""
    recipe = mevf.Recipe() if head == "mevf" else qcr.Recipe()
    run = {"epochs": recipe.epochs, "learning_rate": recipe.learning_rate, "batch_size": recipe.batch_size, **chosen}
    plain: dict[str, Any] = {"kind": "Adamax", "weight_decay": 0.0, "warmup": None, "longest": recipe.clip_norm}
    optimiser = MevfOptimiser(**plain, epochs=run["epochs"]) if head == "mevf" else Optimiser(**plain)
    return Settings(**run, optimiser=optimiser)
