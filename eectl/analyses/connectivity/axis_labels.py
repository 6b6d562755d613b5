"""Which axes of a network's tensors must be permuted together: variables for permutations, and their unification.

A Label says of one axis how its positions are permuted: a tuple of segments that follow each other, each a tuple of factors
(variable or None, size), slowest first, as an index of several digits. ((3, 16), (None, 4)) are 16 units of variable 3, 4
neighbouring positions each; None is a digit that stays. Knows no tensor and no operation: `tracing` does.
"""

from collections.abc import Sequence
from math import prod

Factor = tuple[int | None, int]
Segment = tuple[Factor, ...]
Label = tuple[Segment, ...]

MOST_SEGMENTS = 4096  # past this an axis is pinned: nothing that is trained has so many parts


def fixed(size: int) -> Label:
    """Return the label of an axis that stays as it is."""
    return (((None, size),),) if size != 1 else ((),)


def segment_size(segment: Segment) -> int:
    """Count the positions of a segment."""
    return prod(size for _, size in segment)


def label_size(label: Label) -> int:
    """Count the positions of an axis."""
    return sum(map(segment_size, label))


class Labels:
    """The variables made so far and what is known of each: free, or equal to a Label (which may hold others).

    Every rule that does not fit pins the variables it concerns, that is, keeps their units where they are; so what is left free
    may be permuted as far as the rules are right, and never more.
    """

    def __init__(self) -> None:
        self._known: dict[int, Label] = {}
        self._count = 0

    def new(self, size: int) -> Label:
        """Make a label with a variable of its own."""
        if size == 1:
            return ((),)
        self._count += 1
        return (((self._count, size),),)

    def resolve(self, label: Label) -> Label:
        """Rewrite a label in terms of free variables, in a form that is unique."""
        while True:
            segments = [each for segment in label for each in self._resolve_segment(segment)]
            if len(segments) > MOST_SEGMENTS:
                self._pin_all(segments)
                return fixed(label_size(label))
            resolved = _tidy(segments)
            if resolved == label:
                return resolved
            label = resolved

    def _resolve_segment(self, segment: Segment) -> list[Segment]:
        """Put what is known of a segment's variables in; several segments of one digit are spread out behind digits that stay."""
        for place, (variable, _) in enumerate(segment):
            if variable is None or variable not in self._known:
                continue
            before, after, known = segment[:place], segment[place + 1 :], self._known[variable]
            if len(known) == 1:
                return [(*before, *known[0], *after)]
            if any(name is not None for name, _ in before):
                self._pin_all([segment, *known])
                return [((None, segment_size(segment)),)]
            repeats = segment_size(before)
            if repeats * len(known) > MOST_SEGMENTS:
                self._pin_all([segment, *known])
                return [((None, segment_size(segment)),)]
            return [(*part, *after) for part in known] * repeats
        return [segment]

    def pin(self, label: Label) -> None:
        """Keep a label's units where they are."""
        self._pin_all(self.resolve(label))

    def _pin_all(self, segments: Sequence[Segment]) -> None:
        for segment in segments:
            for variable, size in segment:
                if variable is not None and variable not in self._known:
                    self._known[variable] = fixed(size)
                elif variable is not None and self._known[variable] != fixed(size):
                    self._pin_all(self._known[variable])

    def unify(self, first: Label, second: Label) -> None:
        """Require two axes to be permuted alike; pin what cannot be."""
        assert label_size(first) == label_size(second), f"axes of {label_size(first)} and {label_size(second)} positions"
        while True:
            one, other = self.resolve(first), self.resolve(second)
            if one == other:
                return
            if not (self._bind(one, other) or self._bind(other, one) or self._fit(one, other)):
                self._pin_all([*one, *other])

    def _bind(self, one: Label, other: Label) -> bool:
        """Set a free variable that is a whole axis to the other label; return False where there is none."""
        if len(one) != 1 or len(one[0]) != 1 or one[0][0][0] is None:
            return False
        variable = one[0][0][0]
        if any(name == variable for segment in other for name, _ in segment):
            return False
        self._known[variable] = other
        return True

    def _fit(self, one: Label, other: Label) -> bool:
        """Refine the first part in which two resolved labels differ; return False where they do not fit."""
        mine, theirs = next((a, b) for a, b in zip(one, other, strict=False) if a != b)
        sizes = segment_size(mine), segment_size(theirs)
        if sizes[0] != sizes[1]:
            longer, shorter = (mine, theirs) if sizes[0] > sizes[1] else (theirs, mine)
            if self._break(longer, min(sizes)):
                return True
            movable = any(variable is not None for variable, _ in shorter)
            self._pin_all([longer, shorter])
            return movable or any(variable is not None for variable, _ in longer)
        (first, first_size), (second, second_size) = next((a, b) for a, b in zip(mine, theirs, strict=False) if a != b)
        if first_size == second_size:
            if first is not None and second is not None:
                self._known[first] = (((second, second_size),),)
            else:
                self._pin_all([((first, first_size), (second, second_size))])
            return True
        larger, size, part = (first, first_size, second_size) if first_size > second_size else (second, second_size, first_size)
        if larger is None or size % part:
            self._pin_all([mine, theirs])
        else:
            self.split_factor(larger, size, part)
        return True

    def _break(self, segment: Segment, at: int) -> bool:
        """Cut a segment in two after position `at`, which must be a whole number of its first units."""
        (variable, size), tail = segment[0], segment_size(segment[1:])
        if variable is None or at % tail:
            return False
        count = at // tail
        self._known[variable] = (*self.new(count), *self.new(size - count))
        return True

    def split_factor(self, variable: int, size: int, outer: int) -> None:
        """Give a free variable's units two digits, `outer` and the rest, each permuted by itself."""
        self._known[variable] = ((*self.new(outer)[0], *self.new(size // outer)[0]),)

    def split(self, label: Label, sizes: Sequence[int]) -> list[Label]:
        """Return the labels of an axis that is reshaped into several of these `sizes` (none of them 1)."""
        if len(sizes) == 1:
            return [label]
        inner = prod(sizes[1:])
        resolved = self.resolve(label)
        if len(resolved) > 1:  # equal parts, such as a fused layer's queries, keys and values, are permuted alike
            parts = [self.cut(label, start, start + inner) for start in range(0, sizes[0] * inner, inner)]
            for part in parts[1:]:
                self.unify(parts[0], part)
            return [fixed(sizes[0]), *self.split(parts[0], sizes[1:])]
        digits = list(resolved[0])
        labels: list[Label] = []
        for size in sizes:
            taken: list[Factor] = []
            while (missing := size // segment_size(tuple(taken))) > 1:
                variable, own = digits.pop(0)
                if own > missing and own % missing == 0:
                    if variable is None:
                        digits[:0] = [(None, missing), (None, own // missing)]
                    else:
                        self.split_factor(variable, own, missing)
                        digits[:0] = self._known[variable][0]
                elif missing % own:
                    self.pin(label)
                    return [fixed(each) for each in sizes]
                else:
                    taken.append((variable, own))
            labels.append((tuple(taken),))
        return labels

    def merge(self, labels: Sequence[Label]) -> Label:
        """Return the label of several axes, slowest first, that are reshaped into one."""
        resolved = [self.resolve(label) for label in labels]
        merged: Label = ((),)
        for place, label in enumerate(resolved):
            if len(label) == 1:
                merged = tuple((*segment, *label[0]) for segment in merged)
            elif len(merged) == 1 and all(variable is None for variable, _ in merged[0]):
                merged = label * segment_size(merged[0])
            else:
                self._pin_all([*merged, *(segment for each in resolved[place:] for segment in each)])
                return fixed(prod(map(label_size, labels)))
        return self.resolve(merged)

    def cut(self, label: Label, start: int, stop: int) -> Label:
        """Return the label of the positions from `start` up to `stop`."""
        for edge in (start, stop):
            if not self._edge(label, edge):
                self.pin(label)
                break
        position, kept = 0, []
        for segment in self.resolve(label):
            size = segment_size(segment)
            if start < position + size and position < stop:
                whole = start <= position and position + size <= stop
                kept.append(segment if whole else ((None, min(stop, position + size) - max(start, position)),))
            position += size
        return _tidy(kept) if kept else fixed(0)

    def _edge(self, label: Label, edge: int) -> bool:
        """Make a segment begin at this position; return False where a unit or digit would be broken."""
        position = 0
        for segment in self.resolve(label):
            size = segment_size(segment)
            if position < edge < position + size:
                stays = all(variable is None for variable, _ in segment)
                return stays or self._break(segment, edge - position)
            position += size
        return True


def _tidy(segments: Sequence[Segment]) -> Label:
    """Drop digits of size 1, join neighbours that stay, and write repeats out as segments."""
    tidied: list[Segment] = []
    for segment in segments:
        digits: list[Factor] = []
        for variable, size in segment:
            if size == 1:
                continue
            if variable is None and digits and digits[-1][0] is None:
                digits[-1] = (None, digits[-1][1] * size)
            else:
                digits.append((variable, size))
        stays = all(variable is None for variable, _ in digits)
        if not stays and digits[0][0] is None:
            tidied += [tuple(digits[1:])] * digits[0][1]
        elif stays and tidied and all(variable is None for variable, _ in tidied[-1]):
            tidied[-1] = ((None, segment_size(tidied[-1]) + segment_size(tuple(digits))),)
        else:
            tidied.append(tuple(digits))
    return tuple(tidied)
