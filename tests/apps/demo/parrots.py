"""Voices for the demo that are no models."""

import threading
from dataclasses import dataclass, field


@dataclass
class Parrot:
    """A voice that says words until it is stopped, and notes what it was asked."""

    words: tuple[str, ...] = ('one ', 'two ', 'three')
    name: str = 'parrot'
    takes_images: bool = True
    asked: list = field(default_factory=list)
    fails: Exception | None = None
    stopped: threading.Event = field(default_factory=threading.Event)

    def answer(self, conversation, write, *, settings, seed, should_stop):
        self.asked.append((conversation, settings, seed))
        if self.fails is not None:
            raise self.fails
        said = ''
        for word in self.words:
            if should_stop():
                self.stopped.set()
                break
            write(word)
            said += word
        return said.strip()


class Endless(Parrot):
    """One that would go on for ever, word by word."""

    def answer(self, conversation, write, *, settings, seed, should_stop):
        while not should_stop():
            write('word ')
            self.stopped.wait(0.01)
        self.stopped.set()
        return 'word'
