"""What a report says in words: of the questions, the answers and the bundle, and never a text of the image's file."""

from collections.abc import Sequence

from pmclip_deploy.answer import Answer, ModelInfo
from pmclip_deploy.console import one_line
from pmclip_deploy.report.source import MAKER, Source

DESCRIPTION = "AI answers (research, unverified)"  # of the series
PROBABILITY = "A probability is that of the answer, or of the likeliest candidate if there is no answer. Validation questions calibrate it."


def banner(model: ModelInfo) -> str:
    made = f"Made by {MAKER} with {model.bundle} {model.version}; not verified by a person."
    return one_line(f"RESEARCH USE ONLY, not a medical device. {made}")


def said(answer: Answer, prevalence: float | None) -> str:
    """The question, the answer, where it is from, and what it is worth; or why there is none."""
    if answer.answer is None:
        given = f"no answer: {answer.reason or 'no reason is known'}"
    elif answer.source == "header":
        given = f"{answer.answer} (from the header of the file, not from the picture)"
    elif answer.worth is not None:
        given = f"{answer.answer}; {answer.worth.sentence(prevalence)}"
    else:
        given = answer.answer if answer.probability is None else f"{answer.answer} (probability {answer.probability:.0%})"
    return one_line(f"{answer.question} -> {given}")


def notes(answers: Sequence[Answer], source: Source) -> list[str]:
    """How to read the answers, in no particular form."""
    image, found = answers[0].image, []
    if any(answer.probability is not None for answer in answers):
        found.append(PROBABILITY)
    for answer in answers:
        others = answer.candidates if answer.answer is None or answer.source == "header" else answer.candidates[1:]
        if others and answer.worth is None:
            likely = ", ".join(f"{other.answer} {other.probability:.0%}" for other in others)
            found.append(f"{answer.question} -> other candidates of the picture: {likely}")
        if answer.note:
            found.append(f"{answer.question} -> {answer.note}")
    if image.frames > 1:
        found.append(f"Only frame {image.frame + 1} of {image.frames} was looked at.")
    if source.left_out:
        found.append(f"Not copied, since the image has no valid value of it: {', '.join(source.left_out)}.")
    return [one_line(text) for text in found]


def told(
    parts: Sequence[tuple[Source, Sequence[Answer]]], prevalence: float | None, more: Sequence[str] = ()
) -> tuple[list[tuple[str, str]], list[str]]:
    """(of each answer its question and what is said, all notes once): about one image or several."""
    given, noted = list[tuple[str, str]](), list[str]()
    for number, (source, answers) in enumerate(parts, 1):
        of = f"image {number} of {len(parts)}: " if len(parts) > 1 else ""
        given += [(answer.question, of + said(answer, prevalence)) for answer in answers]
        noted += [text if text == PROBABILITY else of + text for text in notes(answers, source)]
    return given, list(dict.fromkeys((*noted, *map(one_line, more))))


def presence(answer: Answer) -> str | None:
    """"Present", "Absent" or "Undetermined" for a yes/no question about a finding; None for other questions."""
    intent = answer.understood_as
    if intent is None or intent.kind != "finding" or intent.form != "closed" or intent.finding is None:
        return None
    if answer.answer is None:
        return "Undetermined"
    if answer.worth is not None:
        return "Present" if answer.worth.found else "Absent"
    if intent.qualifiers or answer.answer not in ("yes", "no"):
        return None
    return "Present" if (answer.answer == "yes") == intent.polarity else "Absent"
