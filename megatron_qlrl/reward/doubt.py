r"""Decides whether the words around a stated answer deny, hedge or retract it.

A careful grader gives nothing for such an answer, so the rule and the judge read these words with
it, or read no answer. The lists here decide; an ambiguous word counts as doubt. Explanations that
negate something else leave the answer standing: "(Paris). The treaty was not signed in London."
"""

import re

_MAX_BEFORE_CHARS = 300
_MAX_BEHIND_CHARS = 2000
"""A longer text is read only this far from each end: words that retract an answer stand near it or
at the end."""

# "n't" of any verb; "may" only in small letters, because May is a month.
_DENIALS = re.compile(
    r"\b(?:not|never|no|nobody|none|nor|neither|cannot|without|hardly|scarcely|except|false|wrong"
    r"|untrue|incorrect|mistake|mistaken|error|deny|denies|denied|rejects?|rejected|refuse|refutes?|contradicts?|disputes?|questions"
    r"|doubt|doubts|doubtful|unlikely|impossible|improbable|implausible|unclear|unsure|uncertain"
    r"|if|whether|unless|maybe|perhaps|possibly|probably|likely|might|(?-i:may)|could|guess|guessing"
    r"|suppose|suspect|assume|assuming|pretend|wonder|used\sto|contrary|far\sfrom|fail|fails|failed|unable|disagree|disputed|either|or"
    r"|(?:anything|everything|all|nothing)\s+but|(?:rather|other|less|more|greater|fewer)\s+than"
    r"|instead\s+of|at\s+(?:least|most)|up\s+to)\b|n['’]t\b",
    re.IGNORECASE,
)
_NO_DOUBT = re.compile(r"\b(?:no|without(?:\s+(?:a|any))?)\s+doubt\b", re.IGNORECASE)
# What ends a sentence, what ends a clause, and where a new thought begins.
_SENTENCE = re.compile(r"[.!?;][*_\"'”’)\]]*\s|\n\s*\n")
_CLAUSE = re.compile(
    r"[.!?;:,][*_\"'”’)\]]*\s|\n\s*\n|\b(?:and|so|but|therefore|thus|hence|then)\b", re.I
)
_NEW_SUBJECT = re.compile(
    r"(?<=\S)[.!?][*_\"'”’)\]]*(?:\s|$)|\n"
    r"|[,:;]\s+(?:and\s+)?(?:so|thus|hence|therefore|then|we|it|this|that|the)\b",
    re.IGNORECASE,
)

# A response does not state what others say or what it supposes: "some say that the answer is", "let
# us say", "it is a myth that". It states every other that-clause: "it can be inferred that".
_ATTRIBUTED = re.compile(
    r"(?:\b(?:says?|said|thinks?|thought|believes?|believed|claims?|claimed|argues?|argued|imagine|hears?"
    r"|heard|holds?|told|alleged|reported|rumou?red|supposedly|(?:myth|lie|joke|rumou?r|hoax|fiction"
    r"|misconception|fantasy|dream|claim|opinion|has\s+it|reports?|say\s+so))(?:\s+that)?)$",
    re.IGNORECASE,
)
_OWN_WORD = re.compile(
    r"\b(?:i|we)(?:['’](?:d|ll|ve))?\s+(?:\w+\s+){0,2}(?:say|think|believe|claim|hold|argue)(?:\s+that)?$"
    r"|\b(?:text|passage|document|article|report|paper|contract|policy|table|section|paragraph"
    r"|context|source)\s+(?:\w+\s+)?(?:says?|said|claims?|argues?|holds?|reports?|reported)"
    r"(?:\s+that)?$|\bsafe\s+to\s+say\s+that$",
    re.IGNORECASE,
)
_PLAIN_LEADS = frozenset(("", "Therefore", "So", "Thus", "Hence"))
# These words concern the whole sentence: "I am not sure, but the answer is".
_UNCERTAIN = re.compile(
    r"\b(?:maybe|perhaps|possibly|probably|guess|guessing|unsure|no\s+idea)\b"
    r"|(?:\bnot|n['’]t)\s+(?:\w+\s+){0,2}(?:sure|certain|confident|know)\b",
    re.IGNORECASE,
)
# A box after these words is no answer: "any city but", "next to", "London and".
_AWAY = re.compile(
    r"\b(?:but|from|near|unlike|excluding|outside|beside|against|and|or|minus|negative|opposite\sof"
    r"|(?:next|close|compared|contrary|prior)\sto"
    r"|(?:loss|decrease|decline|drop|fall|reduction|deficit)\sof)$",
    re.IGNORECASE,
)

_START = r"(?:^|[.!?;\n(—–])[ \t*_#>\"'“”‘’`\[-]*"  # of a sentence or a line
_OPENINGS = re.compile(
    # of a sentence or a clause: "Paris, no, London"
    rf"(?:{_START}|,\s*)(?:(?:oh|ah|well|okay|ok|hm+|um+)[\s,.]+)?"
    r"(?:wait|nope|nah|hmm+|oops|sorry(?!\s+for\b)|apologies|correction"
    r"|actually(?=[\s*_\"]*,|\s+(?:it|that|this|the|no|not|i)\b|\s+[^\w\s]*(?-i:[A-Z]))|hold\son|hang\son|scratch"
    r"|strike\sthat|never\s?mind|on\s(?:second\sthoughts?|reflection)|or\srather|probably"
    r"|just\skidding|no(?=\s*(?:[,.!:;—–]|$)|\s+(?:wait|sorry|it|that|i)\b))\b"
    # of a sentence, or right after the answer: "(Paris). But it was London."
    rf"|(?:{_START}|^[\s,;]*)(?:or|nor|but|however|rather|instead|otherwise|either(?!\s+way)|not"
    r"|(?:edit|update)(?=\s*[:—–-])"
    r"|unless|if\snot|then\sagain)\b"
    # "That is wrong." Inside a sentence it may concern another candidate.
    rf"|(?:{_START}|^[\s,;]*)(?:this|that|it|which|(?:the\s)?above)(?:\s+is|\s+was|['’]s)\s+"
    r"(?:\w+\s+){0,2}(?:wrong|incorrect|mistaken|inaccurate|untrue|a\slie|a\sjoke|a\smistake"
    r"|an\serror)\b",
    re.IGNORECASE,
)
_HEDGES = re.compile(
    # no commitment
    r"\b(?:maybe|perhaps|possibly|alternatively|unsure|(?:i|just\sa|only\sa|my)\s+guess|guessing"
    r"|(?:not|n['’]t)\s+(?:\w+\s+){0,2}(?:sure|certain|confident)"
    r"|i\s+(?:can|could|do)(?:\s*not|n['’]t)\s+(?:know|tell|say|decide|determine|be\ssure)"
    r"|i(?:\s+am|\s+was|['’]m|\s+(?:may|might|could)\s+be)\s+(?:wrong|mistaken|incorrect)"
    # another candidate
    r"|(?:it|this|that|answer)\s+(?:could|might|may|should)(?!\s+not)(?:\s+\w+){0,2}\s+"
    r"(?:be|have\sbeen)(?!\s+(?:noted|seen|found|read|added)\b)|(?:could|might|may)\s+also"
    r"|(?:can|would)\s+also\s+be(?!\s+(?:seen|found|read))"
    r"|also\s+(?:possible|plausible|correct|right|acceptable|valid|fits?|works?)"
    r"|equally\s+(?:possible|plausible|likely|valid|correct)"
    r"|(?:is|seems)\s+(?:possible|plausible)(?=\s*(?:[.,;!]|$))"
    r"|alternative\s+(?:answer|is)|(?:works|fits|counts|applies)\s+too|(?:['’]s|\sis)\s+either"
    r"|another\s+(?:possibility|possible|candidate|answer|alternative))\b",
    re.IGNORECASE,
)
_RETRACTIONS = re.compile(
    r"\b(?:guess|uncertain|second\sthoughts?|reconsider|retract|torn\sbetween|scratch\sthat"
    r"|really\s+don['’]t\s+know|my\s(?:mistake|bad|error)|made\s(?:a|an)\s(?:mistake|error)"
    r"|take\s(?:it|that|this)\sback|changed?\smy\smind|correct\smyself|re-?think|never\s?mind"
    r"|(?:forget|disregard|ignore)\s(?:it|that|this|the|my|what)|i\smeant|i\snow\sthink"
    r"|(?:do\snot|don['’]t)\sthink\sso|just\skidding|(?:other|real|actual|better)\s+answer"
    r"|(?:would|could|might|may|should|must)\s+be\s+the\s+(?:\w+\s+)?answer"
    r"|answer\s+(?:is\s(?:not|false|wrong|incorrect)|would|could|might|may|should|cannot|isn)"
    r"|not\s+(?:be\s+)?(?:the\s+)?(?:(?:correct|right|real|final|actual)\s+)?(?:answer|correct|right|it)"
    r"|(?:it|this|that)\s+(?:isn['’]t|is\snot|wasn['’]t|was\snot)"
    r"(?=\s*[,.;!]|\s*$|\s+(?:it|there|so)\b))(?!\w)",
    re.IGNORECASE,
)
_SPACES = re.compile(r"\s+")
_NAMED = re.compile(r"\banswer[*_]*\s*[:=][\s*_:]*([^\n]*)", re.IGNORECASE)
_CALLED_RIGHT = re.compile(
    r"([^\s*_()\[\].,;:]{1,30})[\s*_)\].]{1,6}(?:is|are|was|seems|looks)\s+(?:actually\s+|more\s+)?"
    r"(?:correct|right|better|the\s+(?:(?:right|correct|true|real|actual|better)\s+)?"
    r"(?:answer|one|choice|option))\b",
    re.IGNORECASE,
)
_LETTER_LINE = re.compile(r"^[^\w\n]*([A-Z])[^\w\n]*$", re.MULTILINE)
_POINTERS = frozenset("this that it which he she they answer option choice above".split())
_MARKS = " \t\r\n*_`\"'“”‘’«»()[]$.,;:!"


def denied_before(before: str, *, starts_sentence: bool) -> bool:
    """Returns whether the words before "the answer is" deny or doubt it: "it is false that", "I do
    not think", "maybe".

    A clause that has ended concerns something else ("It was not London, so the answer is"), unless
    "that" continues it. With `starts_sentence` ("The answer is") a line break ends it, too.
    """
    before = before[-_MAX_BEFORE_CHARS:]
    if before.strip(_MARKS) in _PLAIN_LEADS:  # the usual case; saves half of the rule's time
        return False
    clause, sentence = _last(_CLAUSE, before), _last(_SENTENCE, before)
    if clause.strip(_MARKS).lower().startswith("that"):
        clause = sentence
    elif starts_sentence:
        clause = clause.rpartition("\n")[2]
        sentence = sentence.rpartition("\n")[2]
    clause = clause.strip(_MARKS)
    is_attributed = _ATTRIBUTED.search(clause) and not _OWN_WORD.search(clause)
    return bool(is_attributed or denies(clause) or _UNCERTAIN.search(sentence))


def thought_before(before: str) -> str:
    """Returns the end of `before` that belongs to the same thought as what follows it."""
    return _last(_NEW_SUBJECT, before[-_MAX_BEFORE_CHARS:])


def leads_away(thought: str) -> bool:
    """Returns whether the words before a box deny or bound it, or name something beside it."""
    return denies(thought) or _AWAY.search(thought) is not None


def denies(text: str) -> bool:
    """Returns whether `text` has words that deny, doubt or bound; "no doubt" is not one of them."""
    return bool(_DENIALS.search(_NO_DOUBT.sub("", text)))


def taken_back(behind: str, stated: str) -> bool:
    """Returns whether the text after the answer `stated` retracts it, hedges it, denies it by its
    own words, or names another answer."""
    if len(behind) > 2 * _MAX_BEHIND_CHARS:
        behind = behind[:_MAX_BEHIND_CHARS] + "\n" + behind[-_MAX_BEHIND_CHARS:]
    if not behind.strip(_MARKS):
        return False
    behind = _SPACES.sub(_one_space, behind)  # long runs would make the search quadratic
    stated = stated.strip(_MARKS)
    return (
        any(words.search(behind) for words in (_OPENINGS, _HEDGES, _RETRACTIONS))
        or _is_denied(stated, behind)
        or _is_replaced(stated, behind)
    )


def is_hedged(prediction: str, gold: str) -> bool:
    """Returns whether an answer asks ("Paris?") or hedges ("Paris, maybe") unlike the gold."""
    if "?" in prediction and "?" not in gold:
        return True
    # The mark in front keeps "Not disclosed" and "No, they are" from counting as retractions.
    hedged = _OPENINGS.search("= " + prediction) or _HEDGES.search(prediction)
    return hedged is not None and not (_HEDGES.search(gold) or denies(gold))


def _one_space(spaces: re.Match[str]) -> str:
    return "\n" if "\n" in spaces[0] else " "


def _last(boundary: re.Pattern[str], text: str) -> str:
    end = 0
    for match in boundary.finditer(text):
        end = match.end()
    return text[end:]


def _is_denied(stated: str, behind: str) -> bool:
    """Returns whether the answer's own words follow a negation or precede a denial: "It is not
    Paris", "(A) is wrong". In "Paris, not London" they do neither."""
    if not stated or stated not in behind:
        return False
    words = rf"(?<!\w){re.escape(stated)}(?!\w)"
    return any(
        re.search(pattern, behind)
        for pattern in (
            r"(?:\b(?:[Nn]ot|[Nn]ever|nor|cannot|except|rather than|other than|instead of"
            r"|rule[sd]? out|rejects?|rejected|excludes?)|n['’]t)\s+(?:\w+\s+){0,2}[(\[\"*]*"
            + words,
            rf"{words}[)\]\"*]*\s+(?:(?:is|was|are|were|seems)\s+(?:\w+\s+)?(?:not|wrong|incorrect"
            r"|false|untrue|mistaken|unlikely|impossible|rejected|ruled|excluded)\b|cannot\b"
            r"|(?:is|was|are|were|do|does|did|could|would|ca|wo)n['’]t\b)",
        )
    )


def _is_replaced(stated: str, behind: str) -> bool:
    """Returns whether `behind` names another answer: "Final answer: London", "(C) is correct", or a
    line with another letter alone."""
    wanted = stated.casefold()
    for named in _NAMED.finditer(behind):
        if named[1].strip(_MARKS).casefold() not in (wanted, ""):
            return True
    if len(stated) == 1 and any(m[1] != stated for m in _LETTER_LINE.finditer(behind)):
        return True
    return any(
        named[1].casefold() not in _POINTERS and not wanted.endswith(named[1].casefold())
        for named in _CALLED_RIGHT.finditer(behind)
    )
