"""Where a recorded model can be cut, so that its parts are run one after the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from fxcompress.graph.paths import above
from fxcompress.graph.recorder import Recording


def cut(
    recording: Recording,
    sites: Sequence[str],
    cost: Callable[[Sequence[str]], int],
    most: int,
) -> tuple[str, ...]:
    """Modules that have all sites among them and cost little enough, the largest that do.

    A module is cut where it costs more than that, its sites are in modules that it calls, and
    these run once and return tensors.  What comes last needs no cut behind it: the last one is left
    out, and others before it while what is then behind the rest costs little enough.

    Args:
        recording: of the model.
        sites: paths of operators.
        cost: of some of them together.
        most: that a part may cost.

    Returns:
        Paths in the order in which they run; none if the model is not cut.
    """
    inner = _called_inside(recording)

    def parts(path: str) -> list[str] | None:
        """A module, or the parts of it; None if neither can be run by itself."""
        mine = [site for site in sites if below(site, path)]
        once = recording.called.get(path) == 1 and path not in recording.opaque
        itself = [path] if once or not path else None
        if itself and cost(mine) <= most:
            return itself
        within = [child for child in inner.get(path, ()) if any(below(s, child) for s in mine)]
        if not all(any(below(site, each) for each in within) for site in mine):
            return itself
        found: list[str] = []
        for child in within:
            inside = parts(child)
            if inside is None:
                return itself
            found += inside
        return found

    found = (parts("") or [""])[:-1]
    while found:
        behind = [site for site in sites if not any(below(site, path) for path in found[:-1])]
        if cost(behind) > most:
            break
        found.pop()
    return tuple(found)


def below(path: str, other: str) -> bool:
    """Whether a module is another one or in it.

    >>> below("layers.1.up", "layers.1"), below("layers.10", "layers.1"), below("up", "")
    (True, False, True)
    """
    return not other or f"{path}.".startswith(f"{other}.")


def _called_inside(recording: Recording) -> dict[str, list[str]]:
    """The modules right inside each module of those that are called, in the order of calls."""
    found: dict[str, list[str]] = {}
    for path in recording.called:
        if path:
            outer = next(each for each in above(path) if each in recording.called or not each)
            found.setdefault(outer, []).append(path)
    return found
