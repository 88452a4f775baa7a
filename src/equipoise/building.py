"""From a method's name to its parts: every part's settings are the keyword-only arguments of its constructor."""

import inspect
import sys
from dataclasses import dataclass, field
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from torch import nn

from equipoise.balancing import BALANCERS
from equipoise.errors import UserError, require
from equipoise.nearest import nearest
from equipoise.routing import SCORERS, SELECTORS
from equipoise.routing.scorer import Scorer
from equipoise.routing.selector import Selector
from equipoise.routing.top_k import TopK


@dataclass(frozen=True)
class Method:
    """One way to balance.

    Attributes:
        name: what users type.
        summary: one sentence.
        source: the paper.
        moves: what it moves to balance.
        traffic: what ranks tell each other beside the layer's own counts.
        cost: what it computes beside plain top-k routing.
        use: when to take it.
        avoid: when not to.
        scorer: key of ``SCORERS``.
        selector: key of ``SELECTORS``.
        balancers: keys of ``BALANCERS``, each with the settings that make it this method.
        settings: settings of the scorer and the selector that make it this method, as ``"part.setting"``.
        pool: a model's layers share one pool of experts.
        inferred: what the source leaves open and we chose; empty where the source is fully known.
    """

    name: str
    summary: str
    source: str
    moves: str
    traffic: str
    cost: str
    use: str
    avoid: str
    scorer: str = "softmax"
    selector: str = "top_k"
    balancers: dict[str, dict[str, Any]] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    pool: bool = False
    inferred: str = ""

    @property
    def causal(self) -> bool:
        """False where a token's experts depend on other tokens, in evaluation too."""
        return SELECTORS[self.selector].causal

    @property
    def looks_ahead(self) -> bool:
        """True where training gives a token experts that depend on other tokens of the call."""
        return SELECTORS[self.selector].looks_ahead

    @property
    def parts(self) -> dict[str, type]:
        """The classes of its scorer, selector and balancers, by name."""
        parts: dict[str, type] = {self.scorer: SCORERS[self.scorer], self.selector: SELECTORS[self.selector]}
        return parts | {name: BALANCERS[name] for name in self.balancers}

    @property
    def state(self) -> tuple[str, ...]:
        """The parts whose state moves with the optimizer's steps."""
        return tuple(name for name, part in self.parts.items() if getattr(part, "learns", hasattr(part, "update")))

    @property
    def status(self) -> str:
        """``"exact"``, or which parts are inferred."""
        return f"inferred in part: {self.inferred}" if self.inferred else "exact"


def build(
    method: Method, num_experts: int, settings: dict[str, Any]
) -> tuple[Scorer, Selector, nn.ModuleDict, dict[str, Any]]:
    """Make a method's parts.

    Args:
        settings: by ``"part.setting"``, or by ``"setting"`` where only one part has it.
    Returns:
        Scorer, selector, balancers by name, and all settings as resolved, by ``"part.setting"``.
    Fails: UserError for a setting that no part has, or that several have, or of a wrong kind, and for a balancer that
        cannot balance what the selector chooses.
    """
    parts = method.parts
    known = {f"{name}.{key}": default for name, part in parts.items() for key, default in _settings_of(part).items()}
    resolved = known | method.settings
    resolved |= {f"{name}.{key}": value for name, given in method.balancers.items() for key, value in given.items()}
    given = [(_full_name(method.name, key, known), value) for key, value in settings.items()]
    twice = sorted({name for name, _ in given if [other for other, _ in given].count(name) > 1})
    require(not twice, f"Setting {', '.join(twice)} is given twice; give it once.")
    resolved |= dict(given)
    hints = {
        f"{name}.{key}": hint for name, part in parts.items() for key, hint in get_type_hints(part.__init__).items()
    }
    for name, value in given:
        require(not _too_large(value), f"{name} is too large for a floating-point number; give a smaller one.")
        require(_fits(value, hints[name]), f"{name}={value!r} must be {_words(hints[name])}.")
    own = {name: {key: resolved[f"{name}.{key}"] for key in _settings_of(part)} for name, part in parts.items()}
    selector = parts.pop(method.selector)(num_experts, **own[method.selector])
    made = {name: part(num_experts + selector.nulls, **own[name]) for name, part in parts.items()}
    scorer, balancers = made.pop(method.scorer), nn.ModuleDict(made)
    _refuse_groups(selector, balancers)
    return scorer, selector, balancers, resolved


def _refuse_groups(selector: Selector, balancers: nn.ModuleDict) -> None:
    """Fails: UserError where a token may take experts of a few groups only, which a balancer does not see."""
    if not isinstance(selector, TopK) or selector.kept_groups == selector.groups:
        return
    for name, balancer in balancers.items():
        require(
            bool(balancer.takes_groups),
            f"{name} finds its cutoffs over all experts and settles uneven with top_k.groups; leave groups out, or "
            "take a method that counts loads, such as loss_free.",
        )


def _settings_of(part: type) -> dict[str, Any]:
    """A part's settings and their defaults: the keyword-only arguments of its constructor."""
    parameters = inspect.signature(part).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}


def _fits(value: Any, hint: Any) -> bool:
    """Whether a setting has the type that its part declares; a whole number serves as a number."""
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if get_origin(hint) in (Union, UnionType):
        return any(_fits(value, each) for each in get_args(hint))
    return type(value) is hint


def _too_large(value: Any) -> bool:
    """Whether this whole number has no counterpart in floating point."""
    return isinstance(value, int) and abs(value) > sys.float_info.max


def _words(hint: Any) -> str:
    names = {float: "a number", int: "a whole number", bool: "true or false", str: "a word", type(None): "left out"}
    return " or ".join(names[each] for each in get_args(hint) or (hint,))


def defaults(method: Method) -> dict[str, Any]:
    """All settings of a method's parts, by ``"part.setting"``, as they are where nobody sets them."""
    return build(method, 2, {})[3]


def _full_name(method: str, key: str, known: dict[str, Any]) -> str:
    """``"part.setting"`` of a setting that may have been given without its part."""
    fits = [name for name in known if key in (name, name.split(".")[1])]
    if len(fits) == 1:
        return fits[0]
    if fits:
        raise UserError(f"Setting {key!r} of method {method!r} is ambiguous: say {' or '.join(fits)}.")
    offers = f"it has {', '.join(known)}" if known else "it has none"
    raise UserError(f"Method {method!r} has no setting {key!r}{nearest(key, known)}; {offers}.")
