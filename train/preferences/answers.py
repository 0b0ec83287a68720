"""Whether a free answer is the gold one: where the answer stands, and math-verify to compare it.

train/README.md has the rules as a user reads them.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping
from decimal import Decimal
from typing import Any, NamedTuple

_TAG = re.compile(r"</?answer>", re.IGNORECASE)
_BOX = re.compile(r"\\(?:boxed|fbox)\s*(?:\{|([^\s{$]+))")
_BOLD = re.compile(r"(?<![\w)])(\*\*|__)(?=\S)(.{1,300}?)(?<=\S)\1(?![\w(])")
# "Answer: 5", "the answer to this is 5", "the solutions are 1 and 2", GSM8K's "#### 5", and a
# heading "Answer" above the answer.
_LABEL = re.compile(
    r"\banswers?\b(?:[^.\n:=]{0,60}?\b(?:is|are|be)\b|\s*[:=])(?:\s*[:=])?"
    r"|\b(?:option|choice|solutions?)\s+(?:is|are)\b:?|^####|^\W*(?:final\s+)?answer\W*$",
    re.IGNORECASE | re.MULTILINE,
)
_NAMED_CHOICE = re.compile(r"\b(?:[Oo]ption|[Cc]hoice|[Aa]nswer)\s+\(?([A-Z])\b")
_LEADING_CHOICE = re.compile(
    r"\(([A-Z])\)|([A-Z])(?:[.:,;)]|$|\s+(?:is|because|since|as)\b|\s*-\s|\s+[\d$\\])"
)
_CHOICE = re.compile(r"\(?([A-Z])\)?[.:]?")
_REASON = re.compile(r",?\s+\b(?:because|since|as|which|so)\b.*", re.DOTALL | re.IGNORECASE)
_SHORT_REPLY = re.compile(r"(yes|no|true|false)\b(?:[,.;:!]|$)", re.IGNORECASE)
# Not the factorial of 5!
_STOP = re.compile(r"(?:\.|(?<=[^\W\d_])!)+$")
_SENTENCE_END = re.compile(r"(?:\.|(?<=[^\W\d_])!)(?:\s|$)")
_WRAPPING = " \t\r\n*_`\"'$"

_TEXT_COMMAND = re.compile(
    r"\\(?:text(?:bf|it|rm|sf)?|math(?:rm|bf|sf)|mbox|operatorname|boldsymbol)\s*\{([^{}]*)\}"
)
_SCIENTIFIC = re.compile(
    r"(?<![\w.\\])(?P<digits>\d+(?:\.\d+)?)(?:[eE](?P<exponent>[+-]?\d+)(?!\w)"
    r"|\s*(?:\\times|\\cdot|[x*])\s*10\s*(?:\^|\*\*)\s*"
    r"(?:\{\s*(?P<braced>[+-]?\d+)\s*\}|(?P<bare>[+-]?\d+)(?!\w)))"
)
_SEPARATOR = re.compile(r"(?<=\d)(?:\\[,!;: ]|\{,\})(?=\d{3}(?!\d))")
_SPACED = re.compile(r"(?<![\d.,])\d{1,3}(?: \d{3})+(?![\d,])")
# What people and models type for what LaTeX has a command for.
_CHARACTERS = str.maketrans({
    "\N{MINUS SIGN}": "-", "\N{EN DASH}": "-", "\N{EM DASH}": " - ", "\N{HYPHEN}": "-",
    "\N{NON-BREAKING HYPHEN}": "-", "\N{NO-BREAK SPACE}": " ", "\N{NARROW NO-BREAK SPACE}": " ",
    "\N{MULTIPLICATION SIGN}": r"\times ", "\N{MIDDLE DOT}": r"\cdot ",
    "\N{DOT OPERATOR}": r"\cdot ", "\N{DIVISION SIGN}": "/", "\N{FRACTION SLASH}": "/",
    "\N{SUPERSCRIPT TWO}": "^2", "\N{SUPERSCRIPT THREE}": "^3", "\N{DEGREE SIGN}": r"^\circ ",
    "\N{INFINITY}": r"\infty ", "\N{GREEK SMALL LETTER PI}": r"\pi ", "\N{UNION}": r"\cup ",
    "\N{LESS-THAN OR EQUAL TO}": r"\leq ", "\N{GREATER-THAN OR EQUAL TO}": r"\geq ",
    "\N{PLUS-MINUS SIGN}": r"\pm ", "\N{VULGAR FRACTION ONE HALF}": r"\frac{1}{2}",
    "\N{VULGAR FRACTION ONE QUARTER}": r"\frac{1}{4}",
    "\N{VULGAR FRACTION THREE QUARTERS}": r"\frac{3}{4}",
    "\N{VULGAR FRACTION ONE THIRD}": r"\frac{1}{3}",
    "\N{VULGAR FRACTION TWO THIRDS}": r"\frac{2}{3}",
    "\N{RIGHT SINGLE QUOTATION MARK}": "'", "\N{LEFT SINGLE QUOTATION MARK}": "'",
    "\N{LEFT DOUBLE QUOTATION MARK}": '"', "\N{RIGHT DOUBLE QUOTATION MARK}": '"',
})  # fmt: skip
# A bare dollar sign may open a formula.
_CURRENCY = re.compile(r"\\\$|[\u00a3\u20ac\u00a5\u20b9]")
_ROOT = re.compile(r"(?:\N{SQUARE ROOT}|(?<![\\A-Za-z])sqrt)\s*(?:\(([^()]*)\)|(\w))")
_BARE_COMMAND = re.compile(r"(?<![\\A-Za-z])(pi|infinity|ln|log|sin|cos|tan|exp)(?![A-Za-z])")
# A rounded value after the exact one.
_APPROXIMATION = re.compile(r"\s*(?:\u2248|\\approx)\s*\$?(-?\d[\d.,]*)")
_ENDING = re.compile(r"\b(?:is|are|was|be)\s+(?:(?:on|in|an?|the)\s+)*(.+)", re.DOTALL)
_LONGEST_FORMULA = 300  # characters: longer text without a word is a loop
_FUNCTIONS = (
    "sin|cos|tan|cot|sec|csc|arcsin|arccos|arctan|sinh|cosh|tanh|log|ln|exp|gcd|lcm|max|min|det|mod"
)
_WORD = re.compile(rf"(?<![\\A-Za-z])(?!(?:{_FUNCTIONS})\b)[^\W\d_]{{2,}}")
_LONG_WORD = re.compile(rf"(?<![\\A-Za-z])(?!(?:{_FUNCTIONS})\b)[^\W\d_]{{3,}}")
# Times, dates and ratios: as mathematics they would be differences and quotients.
_CLOCK_OR_DATE = re.compile(
    r"\d+(?:\s*:\s*\d+)+(?:\s*[ap]\.?m\b\.?)?|\d+-\d+-\d+|\d+/\d+/\d+", re.IGNORECASE
)
_BRACKETS = re.compile(r"[(\[][^()\[\]]*,[^()\[\]]*[)\]]")
_DELIMITER = re.compile(r"[$\n]|\\[()\[\]]")
_ENVIRONMENT = re.compile(r"\\(?:begin|end)\{\w+\*?\}")
_NUMBER = re.compile(r"[-+]?(?<!\d)(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|[-+]?\.\d+")
# A lone letter is a unit's symbol here, or else a variable.
_QUANTITY = re.compile(
    rf"({_NUMBER.pattern})\s+((?:[A-Za-z]{{2,}}|[mgshLNJWVAKC]\b)[A-Za-z /]*(?:\^\d)?)"
)


class Found(NamedTuple):
    """Where a text gives its answer: in a "tag", a "box", after a "label", or the "text" itself."""

    text: str
    place: str


def last_box(text: str) -> str | None:
    """What the last \\boxed{...} or \\fbox{...} holds, to its own closing brace or else its line's
    end."""
    boxes = list(_BOX.finditer(text))
    if not boxes:
        return None
    if boxes[-1][1]:  # TeX's form without braces: \boxed 5
        return boxes[-1][1]
    start, depth = boxes[-1].end(), 1
    for brace in re.finditer(r"\\.|[{}]", text[start:]):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth == 0:
            return text[start : start + brace.start()].strip()
    return text[start:].splitlines()[0].strip() if text[start:].strip() else ""


def _last_tag(text: str) -> str | None:
    """What stands in the last <answer>...</answer>."""
    tags = list(_TAG.finditer(text))
    for opening, closing in zip(reversed(tags[:-1]), reversed(tags[1:]), strict=True):
        if "/" in closing[0] and "/" not in opening[0]:
            return text[opening.end() : closing.start()]
    return None


def find_answer(text: str) -> Found:
    """The first that there is: the last <answer>...</answer>; the last box; what follows the last
    "answer is", "Answer:" or the like; all of the text."""
    if (tag := _last_tag(text)) is not None:
        box = last_box(tag)
        return Found(tag.strip() if box is None else box, "tag")
    if (box := last_box(text)) is not None:
        return Found(box, "box")
    text = _BOLD.sub(r"\2", text)
    if labels := list(_LABEL.finditer(text)):
        after = text[labels[-1].end() :].strip(" \t\r\n*_:")
        if after:
            return Found(after, "label")
    return Found(text.strip(), "text")


def normalize(text: str) -> str:
    """Typographic characters as LaTeX, 1e3 and 1.5 x 10^3 as decimals, no separators inside
    numbers, no dollar sign before an amount."""
    text = _ROOT.sub(lambda match: rf"\sqrt{{{match[1] or match[2]}}}", text)
    text = _CURRENCY.sub("", text.translate(_CHARACTERS).replace(r"\%", "%"))
    text = _BARE_COMMAND.sub(lambda match: "\\" + match[1].replace("infinity", "infty"), text)
    text = _SPACED.sub(lambda match: match[0].replace(" ", ""), _SEPARATOR.sub("", text))
    return _SCIENTIFIC.sub(_decimal, text)


def _decimal(match: re.Match[str]) -> str:
    digits, exponent = match["digits"], int(match["exponent"] or match["braced"] or match["bare"])
    # Longer ones stay powers of ten; LaTeX reads those, but e as Euler's number.
    if abs(exponent) > 40:
        return rf"{digits} \times 10^{{{exponent}}}"
    return format(Decimal(f"{digits}e{exponent}"), "f")


def plain(text: str) -> str:
    """Text without markdown, \\text{}, quotes, a final period and repeated white space."""
    text = _TEXT_COMMAND.sub(r"\1", _BOLD.sub(r"\2", text)).replace("\\ ", " ")
    text = " ".join(text.split()).strip(_WRAPPING)
    return _STOP.sub("", text).strip(_WRAPPING)


def _first_sentence(text: str) -> str:
    line = next((line for line in text.splitlines() if line.strip(_WRAPPING)), "")
    return _SENTENCE_END.split(line.strip(" *_\t"), maxsplit=1)[0]


def _is_prose(text: str) -> bool:
    return bool(_WORD.search(_ENVIRONMENT.sub("", _TEXT_COMMAND.sub("", text))))


def _is_words(gold: str) -> bool:
    """Whether a gold answer (`plain`) is compared as words and not as mathematics."""
    if _CLOCK_OR_DATE.search(gold) or _LONG_WORD.search(_ENVIRONMENT.sub("", gold)):
        return True
    return re.fullmatch(r"[^\W\d_]{2,}", gold) is not None


def _same(first: str, second: str) -> bool:
    return plain(first).casefold() == plain(second).casefold()


def _same_words(gold: str, found: Found, text: str) -> bool:
    """Whether the gold words are the answer, its first sentence less a reason, the last words in
    bold, the end of a single sentence, or the yes or no that it begins with."""
    candidates = [found.text]
    if found.place in ("label", "text"):
        sentence = _first_sentence(found.text)
        candidates += [match[1] for match in [_SHORT_REPLY.match(sentence)] if match]
        if found.place == "label":
            candidates += [sentence, _REASON.sub("", sentence)]
        else:
            candidates += [bold for _, bold in _BOLD.findall(text)[-1:]]
            only = plain(sentence) == plain(found.text)
            candidates += [match[1] for match in [_ENDING.search(sentence)] if match and only]
    if _CLOCK_OR_DATE.fullmatch(plain(gold)):
        dates = [match[0] for match in _CLOCK_OR_DATE.finditer(found.text)]
        candidates += dates[:1] if found.place == "label" else dates[-1:]
        gold, candidates = gold.replace(" ", ""), [part.replace(" ", "") for part in candidates]
    return any(_same(candidate, gold) for candidate in candidates)


def _choice(found: Found) -> str | None:
    """The letter that an answer begins with, or else the last that it names as an option."""
    text = plain(found.text if found.place in ("tag", "box") else _BOLD.sub(r"\2", found.text))
    if len(text) == 1:
        return text.upper()
    if match := _LEADING_CHOICE.match(text):
        return match[1] or match[2]
    # Not A or I: in prose they are words, save at the very end.
    patterns = (_NAMED_CHOICE, r"\(([A-Z])\)", r"\b([A-Z])\)?$", r"(?<![\w'-])([B-HJ-Z])(?![\w'-])")
    found_all = (re.findall(pattern, text) for pattern in patterns)
    return next((letters[-1] for letters in found_all if letters), None)


def _same_quantity(gold: re.Match[str], found: Found) -> bool:
    """Whether the last number with the gold answer's unit, or a number alone, is the gold one."""
    text, unit = plain(found.text), re.escape(gold[2].strip().rstrip("s"))
    amounts = re.findall(rf"({_NUMBER.pattern})\s*{unit}s?\b", text, re.IGNORECASE)
    if not amounts and _NUMBER.fullmatch(text):
        amounts = [text]
    return bool(amounts) and _decimal_of(amounts[-1]) == _decimal_of(gold[1])


def _decimal_of(number: str) -> Decimal:
    return Decimal(number.replace(",", ""))


class MathVerify:
    """1 where an answer is the gold one, else 0: as letters, words or a quantity if the gold answer
    is such, else by math-verify's `parse` and `verify`.

    Raises:
        ValueError: where the package is not installed, naming `option` and what to install.
    """

    def __init__(self, option: str = "rank.judge") -> None:
        try:
            import math_verify
        except ImportError as error:
            raise ValueError(
                f"{option}: judging free answers expects the package math-verify (pip install "
                f"'math-verify[antlr4_13_2]', or the extra 'train'), got none ({error})"
            ) from error
        self.library = math_verify
        # What takes it longer than five seconds is wrong; its warning would print the whole text.
        logging.getLogger("math_verify").setLevel(logging.ERROR)

    def __call__(self, record: Mapping[str, Any], answer: str) -> float:
        return float(self.is_right(str(record["task"]["entry"]["answer"]), answer))

    def is_right(self, gold: str, answer: str) -> bool:
        """Whether `answer`, a text, gives the answer `gold`."""
        gold, answer = normalize(gold).strip(), normalize(answer)
        found = find_answer(answer)
        if not found.text:
            return False
        if _same(found.text, gold):
            return True
        bare = plain(gold)
        if letter := _CHOICE.fullmatch(bare):
            return _choice(found) == letter[1]
        if quantity := _QUANTITY.fullmatch(bare):
            return _same_quantity(quantity, found)
        if _is_words(bare):
            return _same_words(gold, found, answer)
        return self._same_value(gold.strip("$"), found, answer)

    def _same_value(self, gold: str, found: Found, answer: str) -> bool:
        # Without dollars or a box only plain numbers and words parse.
        expected = self.library.parse(f"${gold}$") or self.library.parse(gold)
        digits = _digits(expected)
        found = _exact_or_rounded(found, gold)
        readings = [self._read(found)]
        if found.place == "box" and "," in gold:
            readings.append(self.library.parse(answer))  # it takes boxes side by side as a list
        if found.place in ("label", "text") and _BRACKETS.search(gold):
            readings += [self.library.parse(f"${b}$") for b in _BRACKETS.findall(found.text)[-1:]]
        return any(
            self.library.verify(
                expected, reading, float_rounding=digits, allow_set_relation_comp=True
            )
            for reading in readings
        )

    def _read(self, found: Found) -> list[Any]:
        """What math-verify makes of an answer."""
        parse, text = self.library.parse, found.text
        if found.place == "box":
            return parse(f"\\boxed{{{text}}}")
        sentence = _first_sentence(text) if found.place == "label" else text.rstrip(". \n")
        listed = re.sub(r",?\s+(?:and|or)\s+", ", ", sentence)
        for candidate in (sentence, listed):
            # A formula without dollars is found by nobody; in prose the library looks for itself.
            candidate = candidate.strip(_WRAPPING)
            formula = len(candidate) <= _LONGEST_FORMULA and not _DELIMITER.search(candidate)
            if candidate and formula and not _is_prose(candidate):
                return parse(f"${candidate}$") or parse(text)
        return parse(f"answer: {text}" if found.place == "label" else text)


def _exact_or_rounded(found: Found, gold: str) -> Found:
    """Of "5/6 \\approx 0.83" the form that the gold answer has."""
    if "." not in gold:
        return found._replace(text=_APPROXIMATION.sub("", found.text))
    rounded = list(_APPROXIMATION.finditer(found.text.rstrip(". $\n")))
    if rounded and rounded[-1].end() == len(rounded[-1].string):
        return found._replace(text=rounded[-1][1])
    return found


def _digits(expected: list[Any]) -> int:
    """Decimals to which values are compared: math-verify's six, and six digits of a smaller one."""
    try:
        value = abs(float(expected[0]))
    except (TypeError, ValueError, IndexError, OverflowError):
        return 6
    if value == 0:
        return 12
    return 6 + max(0, -1 - math.floor(math.log10(value))) if value < 1 else 6
