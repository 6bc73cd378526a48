"""List and remove caches of encoded pairs.

    dedpo cache
    dedpo cache --remove 0123456789abcdef

`dedpo train` keeps images and prompts that it encoded in the user's cache folder, where that pays (data.cache auto). A removed cache is
made anew by the next run that needs it.
"""

from __future__ import annotations

import time

from dedpo_diffusion.core.console import UserError, say, stage
from dedpo_diffusion.core.texts import size_words
from dedpo_diffusion.settings import CacheSettings


def run(settings: CacheSettings) -> None:
    """List and remove caches of encoded pairs."""
    from dedpo_diffusion.core.caches import Cache, in_use, list_caches, remove, user_root

    root = settings.folder or user_root()
    found = list_caches(root)
    names = {cache.folder.name for cache in found}
    if settings.remove_all and settings.remove:
        raise UserError("give --remove NAME or --remove_all true, not both")
    unknown = [name for name in settings.remove if name not in names]
    if unknown:
        raise UserError(f"{root}: no cache {unknown[0]!r}; `dedpo cache` lists the names")
    wanted = [cache for cache in found if settings.remove_all or cache.folder.name in settings.remove]
    kept: list[str] = []
    for cache in wanted:
        try:
            say(f"removed {cache.folder.name}: {size_words(remove(cache.folder))}")
        except UserError as error:
            kept.append(str(error))
    if kept:
        raise UserError("; ".join(kept))
    if wanted:
        return

    def line(cache: Cache) -> str:
        about = cache.about
        pairs = (f"{about['some']} of " if "some" in about else "") + f"pairs {about.get('pairs', '?')}"
        what = f"{pairs}, model {about.get('model', '?')}" if about else "made by an earlier version"
        state = ("" if cache.whole else ", not finished") + (", in use" if in_use(cache.folder) else "")
        day = time.strftime("%Y-%m-%d", time.localtime(cache.used))
        return f"{cache.folder.name}  {size_words(cache.size):>9}  last used {day}  {what}{state}"

    if not found:
        say(f"{root}: no caches")
        return
    say(f"{root}: {size_words(sum(cache.size for cache in found))} in {len(found)} caches")
    for cache in found:
        say(line(cache))


def main(argv: list[str] | None = None) -> int:
    """Entry point."""
    return stage(CacheSettings, run, argv, prog="dedpo cache")


if __name__ == "__main__":
    raise SystemExit(main())
