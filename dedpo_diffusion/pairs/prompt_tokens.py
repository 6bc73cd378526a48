"""How long prompts are in the tokens that a model reads, whatever their script; what is longer is cut off."""

from __future__ import annotations

import gzip
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from dedpo_diffusion.core.texts import shown

AT_ONCE = 4096  # prompts
MERGES = 49152 - 256 - 2  # lines of CLIP's vocabulary file that are pairs of tokens: its 49408 tokens are these, 512 bytes and 2 ends
WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"  # which CLIP cuts a text into


@dataclass(frozen=True)
class TokenCounter:
    """Counts tokens.

    Attributes:
        name: whose tokenizer it is, for messages.
        limit: how many tokens of a prompt are read, without the two that mark its beginning and end.
        count: the tokens of each prompt, without these marks.
    """

    name: str
    limit: int
    count: Callable[[Sequence[str]], list[int]]

    def lengths(self, prompts: Sequence[str], advance: Callable[[int], object] = lambda _: None) -> list[int]:
        """Tokens of each prompt; each different one is counted once. `advance` is told how many of these are done."""
        known: dict[str, int] = {}
        different = list(dict.fromkeys(prompts))
        for start in range(0, len(different), AT_ONCE):
            part = different[start : start + AT_ONCE]
            known |= dict(zip(part, self.count(part), strict=True))
            advance(len(part))
        return [known[prompt] for prompt in prompts]

    def cut(self, prompts: Sequence[str], lengths: Sequence[int], where: Callable[[int], str] | None = None) -> str | None:
        """How many prompts are cut, with the longest as an example, in words; None where none is.

        Args:
            prompts: N prompts.
            lengths: their tokens, of `lengths`.
            where: says where the prompt of a number stands.
        """
        cut = [k for k, length in enumerate(lengths) if length > self.limit]
        if not cut:
            return None
        longest = max(cut, key=lambda k: lengths[k])
        place = "" if where is None else f" at {where(longest)}"
        return (
            f"{len(cut)} of {len(prompts)} prompts have more than the {self.limit} tokens that {self.name} reads, and are cut off there; "
            f"the longest has {lengths[longest]}{place}: {shown(prompts[longest])}"
        )


def clip_counter() -> TokenCounter:
    """By the tokens of CLIP, which all Stable Diffusions of this family read, from the file that open_clip carries.

    Reference: Radford et al. 2021, the byte pairs of openai/CLIP.
    """
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

    found = find_spec("open_clip")
    assert found is not None and found.origin is not None  # it is a dependency
    with gzip.open(Path(found.origin).with_name("bpe_simple_vocab_16e6.txt.gz"), "rt", encoding="utf-8") as file:
        merges = [(left, right) for left, right in (line.split() for line in file.read().split("\n")[1 : MERGES + 1])]
    letters = _byte_letters()
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(pair) for pair in merges), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, end_of_word_suffix="</w>", unk_token="<|endoftext|>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(WORDS), behavior="removed", invert=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    return TokenCounter("CLIP", 75, lambda prompts: [len(found.ids) for found in tokenizer.encode_batch(list(prompts))])


def _byte_letters() -> list[str]:
    """The letters by which byte-pair vocabularies write the 256 bytes, in their order: printable ones are themselves, and come first."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [*map(chr, printable), *(chr(256 + number) for number in range(256 - len(printable)))]
