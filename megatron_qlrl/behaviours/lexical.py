"""Counts the four behaviours of QwenLong-L1 (arXiv 2505.17667) by patterns, without a judge.

The paper asks a model for its counts, as do those whose behaviours these are (Gandhi et al., arXiv
2503.01307). The patterns here are this package's own; keywords beside a model's judgement are
what "Understanding R1-Zero-Like Training" (arXiv 2503.20783) uses to find self-reflection. They
are English, and count the sentences in which a behaviour is announced, whether it follows or not.
"""

import re
from collections.abc import Mapping

BEHAVIOURS = ("grounding", "subgoal_setting", "backtracking", "verification")

_SOURCE = (
    r"(?:text|passage|document|article|report|table|paragraph|section|contract|policy|context|"
    r"statement|source|excerpt)s?"
)
_I = r"(?:i|we)"
_LET = r"(?:let me|let us|let's|i'll|i will|i should|i need to|we should|we need to|we can)"

_PATTERNS: Mapping[str, tuple[str, ...]] = {
    "grounding": (
        rf"\b(?:according to|based on|as per) (?:the|this) (?:\w+ )?{_SOURCE}\b",
        rf"\b(?:the|this) {_SOURCE}(?: \w+)? (?:says?|states?|mentions?|notes?|reports?|shows?|"
        rf"describes?|explains?|lists?|gives?)\b",
        rf"\b(?:stated|mentioned|noted|described|given|shown|written|reported|listed) in the "
        rf"(?:\w+ )?{_SOURCE}\b",
        rf"\b(?:look|looking|go|going|search|searching|scan|scanning|read|reading)"
        rf"(?: back)? (?:at|through|in|into|to|over)? ?the (?:\w+ )?{_SOURCE}\b",
        rf"\b(?:in|from) (?:the )?{_SOURCE} \d+\b",
        rf"\b(?:in|from) the (?:provided|given|above|original) {_SOURCE}\b",
    ),
    "subgoal_setting": (
        rf"\bfirst(?:ly)?,? (?:{_I} (?:need|have|should|must|will|can)\b|{_LET}\b)",
        rf"\b(?:next|then|after that|finally|second|secondly),? (?:{_I} (?:need|have|should|must|"
        rf"will)\b|{_LET}\b)",
        rf"\bto (?:answer|solve|find|determine|do|get) (?:this|that|it)\b.{{0,40}}?\b{_I} "
        rf"(?:first )?(?:need|have|must|should)\b",
        rf"\b{_I} (?:first )?need to (?:first )?(?:find|determine|identify|calculate|compute|"
        rf"figure out|locate|know)\b",
        r"\b(?:the )?(?:first|next) step\b",
        r"^\W*step \d+\b",
        r"\bbreak (?:this|it|that|the \w+) (?:down|into)\b",
    ),
    "backtracking": (
        r"^\W*(?:(?:but|oh|no|hmm|ah|so)\W+){0,3}wait\b(?! (?:times?|lists?|for|until)\b)",
        r"^\W*(?:(?:but|oh|no|hmm|ah)\W+){0,3}(?:hold on|scratch that)\b",
        r"\bon second thoughts?\b",
        r"\b(?:try|start|begin)(?:ing)? (?:again|over)\b",
        r"\b(?:try|take|use|consider)(?:ing)? (?:a different|another|an alternative) "
        r"(?:approach|way|method|route|strategy)\b",
        rf"\b{_I} (?:have )?(?:made|make) an? (?:mistake|error)\b",
        rf"\b{_I} (?:was wrong|were wrong|misread|misunderstood|overlooked)\b",
        r"\bthat(?:'s| is| was| can't be| cannot be) (?:not right|not correct|wrong|incorrect)\b",
        r"\b(?:won't|doesn't|does not|will not|didn't|did not) work\b",
        rf"\b{_LET} (?:reconsider|rethink|revise|go back)\b",
    ),
    "verification": (
        rf"\b(?:{_LET}|to) (?:just |also |quickly )?(?:re-?check|check|verify|confirm|validate|"
        rf"make sure)\b",
        r"\b(?:double|cross)[- ]?check(?:s|ed|ing)?\b",
        r"\bsanity check\b",
        r"\bto be (?:sure|certain|safe)\b",
        r"\b(?:this|that|which) (?:matches|agrees with|is consistent with|confirms)\b",
        r"\bre-?(?:calculate|compute|count)\b",
        r"\bplug(?:ging)? (?:it|this|that|these|them) back\b",
    ),
}
_COMPILED = {name: re.compile("|".join(patterns)) for name, patterns in _PATTERNS.items()}
_SENTENCE_END = re.compile(r"[.!?]+(?=\s|$)|\n+")
_APOSTROPHES = str.maketrans({"\u2019": "'"})


def lexical_counts(response: str) -> dict[str, int]:
    """Returns, by behaviour, the number of sentences that have one of its patterns. One sentence
    may count for several behaviours."""
    text = response.casefold().translate(_APOSTROPHES)
    sentences = [" ".join(part.split()) for part in _SENTENCE_END.split(text)]
    return {
        name: sum(pattern.search(sentence) is not None for sentence in sentences)
        for name, pattern in _COMPILED.items()
    }
