"""The answers that pmclip-lite's head can give: kinds of question, and for each its columns."""

from collections import Counter, defaultdict

import torch

from pmclip_deploy.train import kinds as K
from pmclip_deploy.train.datasets import Question

BY_HEART = "abnormality"  # 1,500 names, most of them seen once or twice: nothing to learn, but a memory may hold them


class Vocabulary:
    """Kinds of question and, for each of them, a column for each of its answers, as the training questions have them."""

    def __init__(self, questions: list[Question], findings: list[str]) -> None:
        counts: dict[str, Counter[str]] = defaultdict(Counter)
        for q in questions:
            counts[K.kind_of(q)][q.answer] += 1
        self.majority = {kind: c.most_common(1)[0][0] for kind, c in counts.items()}
        for name in findings:
            counts[f"finding: {name}"] = Counter({"no": 1, "yes": 1})
            self.majority[f"finding: {name}"] = "no"
        self.kinds = [*sorted(counts), *K.REASONS]
        self.kind_id = {kind: i for i, kind in enumerate(self.kinds)}
        columns = [(kind, answer) for kind in sorted(counts, key=lambda k: (k == BY_HEART, k)) for answer in sorted(counts[kind])]
        self.column = {pair: i for i, pair in enumerate(columns)}
        self.answers = [answer for _, answer in columns]
        self.trained = sum(kind != BY_HEART for kind, _ in columns)
        self.allowed = torch.zeros(len(self.kinds), len(columns), dtype=torch.bool)
        for (kind, _), i in self.column.items():
            self.allowed[self.kind_id[kind], i] = True
