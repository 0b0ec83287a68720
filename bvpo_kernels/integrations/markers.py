"""The markers of a trace, read from the literal of an empty one, at the end of a prompt."""

from __future__ import annotations

import re
from dataclasses import dataclass

# The last bracketed word with a slash: </think>, [/THINK].
_CLOSE = re.compile(r"[^\w\s]/\S*(?=\s*$)")


@dataclass(frozen=True)
class TraceMarkers:
    """literal: what an empty prompt ends with; open, close: its markers, "" for none."""

    literal: str
    open: str
    close: str

    @classmethod
    def of(cls, literal: str) -> TraceMarkers:
        r"""The markers of a literal: "<think>\n\n</think>\n\n" has <think> and </think>.

        A close marker alone, as DeepSeek-V3.1 writes it, has the open marker that it would close;
        one word without a slash is all literal.
        """
        found = _CLOSE.search(literal)
        words = literal[: found.start() if found else None].split()
        if found is None:
            marked = len(words) > 1 and not words[0][0].isalnum() and not words[-1][0].isalnum()
            return cls(literal, *((words[0], words[-1]) if marked else ("", "")))
        close = found.group()
        return cls(literal, words[0] if words else close.replace("/", "", 1), close)

    def opened(self, prompt: str) -> bool:
        """Whether a prompt ends in an open trace."""
        return bool(self.open) and prompt.rstrip().endswith(self.open)

    def closed(self, prompt: str) -> bool:
        """Whether a prompt ends in a closed trace or in the literal."""
        ends = (self.close, self.literal.rstrip())
        return any(end and prompt.rstrip().endswith(end) for end in ends)

    def before(self, prompt: str) -> str:
        """A prompt without an open marker at its end."""
        return prompt.rstrip().removesuffix(self.open) if self.opened(prompt) else prompt

    def bare(self, prompt: str) -> str:
        """A prompt without markers and white space at its end, to compare two renders by."""
        while True:
            shorter = prompt.rstrip()
            for marker in (self.literal.strip(), self.close, self.open):
                shorter = shorter.removesuffix(marker)
            if shorter == prompt:
                return prompt
            prompt = shorter

    def emptied(self, prompt: str) -> str:
        """The prompt and the literal, which replaces an open marker; a closed trace stays."""
        return prompt if self.closed(prompt) else self.before(prompt) + self.literal

    def unrepeated(self, prompt: str, response: str) -> str:
        """The response without the markers with which its prompt already ends."""
        if self.opened(prompt):
            rest = response.lstrip().removeprefix(self.open)
            if rest == response.lstrip():
                return response
            space = prompt[len(prompt.rstrip()) :]
            return rest.removeprefix(space)
        if not self.closed(prompt):
            return response
        inner = self.literal.strip().removeprefix(self.open).removesuffix(self.close).split()
        before, close = [self.open, *inner] if self.open else inner, self.close
        pattern = r"\s*".join(re.escape(word) for word in before)
        if close and pattern:
            pattern = rf"(?:{pattern}\s*)?{re.escape(close)}"
        return re.sub(rf"\A\s*{pattern or re.escape(close)}\s*", "", response)
