"""What the scripts at the root share: fast `--help`, overrides checked before anything is loaded, errors in one line."""

from __future__ import annotations

import difflib
import gc
import inspect
import re
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
CONF = ROOT / "conf"

LITERAL = ("prompt", "image", "run", "gguf")
"""Keys whose value is taken as it is typed, whatever marks it has: a sentence, a path."""


def groups() -> dict[str, list[str]]:
    """Config groups and their options, by what lies in conf/."""
    return {d.name: sorted(f.stem for f in d.glob("*.yaml")) for d in sorted(CONF.iterdir()) if d.is_dir()}


def help_text(main: Callable, config: str) -> str:
    """The script's own docstring, its groups and the page with its keys. Reads text only, so it takes no time."""
    page = (CONF / f"{config}.yaml").read_text()
    used = [
        name
        for name in groups()
        if f"- {name}:" in page or f"/{name}:" in page or (name in ("recipe", "corpus") and "- model:" in page)
    ]
    lines = [f"  {name}={' | '.join(groups()[name])}" for name in used]
    shown = "\n\nchoices (conf/<group>/<option>.yaml):\n" + "\n".join(lines) if lines else ""
    return (
        textwrap.dedent(inspect.getmodule(main).__doc__ or "").strip()
        + shown
        + f"\n\nconf/{config}.yaml:\n"
        + textwrap.indent(page, "  ")
    )


def _keys(tree, prefix: str = "") -> list[str]:
    from omegaconf import DictConfig, OmegaConf

    found = []
    for key in tree:
        name = f"{prefix}{key}"
        found.append(name)
        if (
            not OmegaConf.is_missing(tree, key)
            and isinstance(node := tree._get_node(key), DictConfig)
            and not node._is_none()
            and not node._is_interpolation()
        ):
            found += _keys(node, f"{name}.")
    return found


def check_overrides(config: str, overrides: list[str]) -> None:
    """Refuse misspelt keys and options, naming the nearest right ones.

    Raises:
        ValueError: the first override that names nothing.
    """
    from hydra import compose, initialize_config_dir
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    options, chosen, rest, parser = groups(), [], [], OverridesParser.create()
    for override in overrides:
        key, _, value = override.lstrip("+~").partition("=")
        try:
            parser.parse_override(override)
        except HydraException as error:
            told = str(error).partition("\n")[0]
            raise ValueError(
                f"{override} cannot be read ({told}): put a value that has = , : or brackets in it in quotes, such as \"key='a=b'\""
            ) from None
        if key not in options:
            rest.append((override, key))
            continue
        if not value.strip("[] "):
            raise ValueError(f"{override}: name at least one {key} (there are: {', '.join(options[key])})")
        for option in value.strip("[]").split(","):
            if option.strip() and option.strip() not in options[key]:
                raise ValueError(
                    f"{key}={option}: there is no such {key}{nearest(option, options[key])} (there are: {', '.join(options[key])})"
                )
        if "," not in value or value.startswith("["):
            chosen.append(override)
    with initialize_config_dir(str(CONF), version_base="1.3"):
        try:
            known = _keys(compose(config, chosen))
        except HydraException as error:
            raise ValueError(f"{' '.join(chosen)} cannot be composed: {error}") from None
    for override, key in rest:
        if key.startswith("hydra") or override.startswith("+") or key in known:
            continue
        raise ValueError(
            f"{override}: there is no key {key!r}{nearest(key, known + list(options))}. "
            f"To add a new one on purpose, write +{override}"
        )


def literal(word: str) -> str:
    """An override as Hydra has to be given it: the value of a key of LITERAL in quotes, unless it is `null` or stands in some."""
    key, _, value = word.partition("=")
    if key not in LITERAL or value in ("", "null") or (len(value) > 1 and value[0] == value[-1] and value[0] in "'\""):
        return word
    # Backslashes count where a quote, an interpolation or the end follows, and nowhere else.
    inside = re.sub(r"(\\*)(\"|\$\{|\Z)", lambda found: 2 * found[1] + (f"\\{found[2]}" if found[2] else ""), value)
    return f'{key}="{inside}"'


def nearest(word: str, among: list[str]) -> str:
    """The likeliest meant, as the end of an error's sentence; or nothing."""
    close = difflib.get_close_matches(word, among, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def script(main: Callable, config: str, sweep: bool = False) -> None:
    """Run `main(cfg)` under Hydra. What a user can mend (ValueError, OSError) is told in one line; the rest keeps its traceback.

    Args:
        sweep: with `-m` train many cells (see `mvlm.sweep`); other scripts have no `-m`.
    """
    arguments = sys.argv[1:] = [literal(word) for word in sys.argv[1:]]
    if {"--help", "-h"} & set(arguments):
        print(help_text(main, config))
        return
    many = {"--multirun", "-m"} & set(arguments)
    try:
        if many and not sweep:
            raise ValueError(f"{config}.py does one thing at a time: leave out {many.pop()}")
        check_overrides(config, [a for a in arguments if "=" in a and not a.startswith("-")])
        if many:
            from mvlm import sweep as sweeping

            sys.exit(sweeping.main([a for a in arguments if a not in ("--multirun", "-m")]))
        import hydra

        hydra.main(version_base="1.3", config_path=str(CONF), config_name=config)(guarded(main))()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


def instance(node: Any) -> Any:
    """What a part of a configuration names, made.

    Raises:
        ValueError, OSError: the part's own, without Hydra's words around them.
    """
    from hydra.errors import InstantiationException
    from hydra.utils import instantiate

    try:
        return instantiate(node, _convert_="all")
    except InstantiationException as error:
        raise error.__cause__ if isinstance(error.__cause__, ValueError | OSError) else error from None


@contextmanager
def imports() -> Iterator[None]:
    """Looks for no garbage meanwhile. Modules make a million objects that all stay, and to go through them again and again takes a
    fifth of a script's start."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def guarded(main: Callable) -> Callable:
    """`main`, with the errors that a user can mend told without a traceback."""
    from omegaconf.errors import MissingMandatoryValue

    from mvlm import settings

    def run(cfg) -> None:
        try:
            settings.check(cfg)
            main(cfg)
        except MissingMandatoryValue as error:
            sys.exit(f"error: {error.full_key}=... is missing: --help tells what it is")
        except (ValueError, OSError) as error:
            sys.exit(f"error: {error}")

    run.__module__, run.__name__ = main.__module__, main.__name__
    return run
