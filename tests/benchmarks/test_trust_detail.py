"""How many answers change with the threshold of a modality's detail."""

from pmclip_deploy.answer import Candidate
from pmclip_deploy.benchmarks.trust_detail import ASKED, table


def flair(share: float) -> tuple[Candidate, ...]:
    return Candidate("mr - flair", share), Candidate("mr - stir", 1 - share)


def test_a_detail_that_a_change_moves_across_the_threshold_is_another_answer() -> None:
    film = (Candidate("xr - plain film", 0.6), Candidate("ct noncontrast", 0.4))
    said = [[flair(0.82), flair(0.78), flair(0.83), None], [film] * 4, [None] * 4]
    rows = {line.split(" | ")[0].strip("| "): line.split(" | ")[1:] for line in table(said).splitlines()[2:]}
    changes = {threshold: [cell.partition(",")[0] for cell in cells[:-1]] for threshold, cells in rows.items()}
    assert len(ASKED) == 3 and changes["0.80"] == ["0.500", "0.000", "0.000"]  # of two answers; the third picture has none
    assert {threshold for threshold, shares in changes.items() if shares != ["0.000"] * 3} == {"0.80"}
    assert rows["0.80"][-1] == "2 of 2 |" and rows["0.85"][-1] == "1 of 2 |"  # a plain film has no other detail


def test_kinds_of_contrast_are_one_answer_and_what_is_not_determined_is_another() -> None:
    said = [[(Candidate("iv", 0.5), Candidate("gi", share - 0.5), Candidate("noncontrast", 1 - share))] * 4 for share in (0.96, 0.82)]
    lines = table(said, "contrast", ["gi and iv", "noncontrast"]).splitlines()
    cells = {line.split(" | ")[0].strip("| "): line.strip("| ").split(" | ")[-2:] for line in lines[2:]}
    assert cells["0.80"] == ["2 of 2", "1"] and cells["0.95"] == ["1 of 2", "1"]
