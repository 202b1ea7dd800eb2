"""Which encoding a text without any mark has: the one in which its letters stand together as people write them."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable
from functools import cache

from latentmem.errors import UnreadableError

SIZE = 20_000  # bytes that are looked at
CONTROLS = re.compile(r"[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f\ue000-\uf8ff\ufdd0-\ufdef\ufffd-\uffff]")
NOT_ASCII = re.compile(rb"(?:[\x80-\xff]+[\x00-\x09\x0b-\x7f]{0,80})+")
ALPHABETS = tuple(  # letters outside ASCII that stand together in a language, small
    map(
        frozenset,
        "äöüß àâçéèêëîïôûùœ áéíñóúü àèéìòóù àáâãçéêíóôõú åäöæøé ëïéèüóö áéíðþæöóúý ąćęłńóśźż áčďéěíňóřšťúůýž"  # noqa: SIM905
        " áčďéíľĺňóôŕšťúýžä áéíóöőúüű čćđšž ăâîşţșț çğıöşüâîi̇ ąčęėįšųūž āčēģīķļņšūž äõöüšž".split(),
    )
)
CYRILLIC = set("оеаинтсрвлкмдпуяыьгзбчйхжшюцщэфъёіїєґўј")
USUAL_CYRILLIC = set("оеаинтсрвлкмдпуяыьгзб")
USUAL_GREEK = set("αοιετσνηυρπκμλςάέήίόύώ")
SIGNS = set("“”‘’„‚–—…€£°§©«»·•¿¡。、，！？：；「」『』（）・ー　《》")
CHINESE, JAPANESE, KOREAN = ("gb18030", "big5"), ("cp932", "euc_jp", "iso2022_jp"), ("euc_kr", "cp949")
LATIN = ("cp1252", "cp1250", "iso8859_2", "cp1254", "cp1257", "mac_roman")
PRIOR = {  # of encodings that are told apart by nothing else: those that people have
    **{"cp1252": 0.05, "mac_roman": -0.15, "iso8859_2": -0.03, "cp1254": -0.02, "cp1257": -0.06},
    **{"koi8_r": -0.02, "koi8_u": -0.03, "cp949": -0.02},
    **{"utf_16_le": -0.1, "utf_16_be": -0.12, "utf_32_le": 0.0, "utf_32_be": 0.0},
}
OTHERS = (
    "cp1251",
    "koi8_r",
    "koi8_u",
    "cp1253",
    "cp1255",
    "cp1256",
    "cp874",
    "utf_32_le",
    "utf_32_be",
    "utf_16_le",
    "utf_16_be",
)
ENCODINGS = (*LATIN, *CHINESE, *JAPANESE, *KOREAN, *OTHERS)
LEVELS = {  # where an encoding has the characters that are used most: the first bytes
    "gb18030": ("gb2312", 0xB0, 0xD7),
    "big5": ("big5", 0xA4, 0xC6),
    **dict.fromkeys(JAPANESE, ("euc_jp", 0xB0, 0xCF)),
}
LEAST, LEAST_WIDE = 0.2, 0.4  # of a text; of one in 16 or 32 bits, which numbers look like


def guess(data: bytes) -> tuple[str, str]:
    """The text, and its encoding.

    Raises:
        UnreadableError: it is a text of no usual encoding, or no text.
    """
    head = _sample(data)
    scores = {name: _score(text, name) for name in ENCODINGS if (text := _decoded(head, name)) is not None}
    for name in sorted(scores, key=lambda one: -scores[one]):
        if scores[name] < (LEAST_WIDE if name.startswith("utf") else LEAST):
            continue
        try:
            text = data.decode(name)
        except UnicodeError:
            continue
        if not CONTROLS.search(text):
            return text, name
    raise UnreadableError("is not text that can be read; if it is text, name its encoding.")


def _sample(data: bytes) -> bytes:
    """The bytes to look at: the first, or where those are nearly all ASCII, the ones around others."""
    head = data[:SIZE]
    if len(data) <= SIZE or b"\0" in head or b"\x1b" in head or len(head.translate(None, bytes(range(128)))) > 99:
        return head
    parts, last, size = [], 0, 0
    for match in NOT_ASCII.finditer(data):
        before = data[max(last, match.start() - 80) : match.start()].rpartition(b"\n")[2]
        parts.append(before + match[0])
        last, size = match.end(), size + len(parts[-1]) + 1
        if size > SIZE:
            break
    return b"\n".join(parts)[:SIZE]


def _decoded(data: bytes, encoding: str) -> str | None:
    if b"\0" in data and not encoding.startswith("utf"):
        return None
    for end in range(
        len(data), max(0, len(data) - 4) if len(data) == SIZE else len(data) - 1, -1
    ):  # cut in a character
        try:
            text = data[:end].decode(encoding)
        except UnicodeError:
            continue
        return None if CONTROLS.search(text) else text
    return None


def _score(text: str, encoding: str) -> float:
    """How much a text looks like one that people write, about -2 to 1; of its signs outside ASCII the mean."""
    alphabet = _alphabet(text)
    values = [
        _value(text[i - 1 : i] or " ", sign, text[i + 1 : i + 2] or " ", encoding, alphabet)
        for i, sign in enumerate(text)
        if sign > "\x7f" and sign != "\xa0"
    ]
    return (sum(values) / len(values) if values else 1.0) + PRIOR.get(encoding, 0)


def _alphabet(text: str) -> frozenset[str]:
    """The letters of the language that has most of a text's Latin letters outside ASCII."""
    counts = Counter(sign for sign in text.lower() if sign > "\x7f")
    return max(ALPHABETS, key=lambda alphabet: sum(counts[letter] for letter in alphabet))


def _value(before: str, sign: str, after: str, encoding: str, alphabet: frozenset[str]) -> float:
    if sign in SIGNS:
        return -0.5 if before.isalpha() and after.isalpha() and sign not in "’—–…・ー" else 0.95
    if not sign.isalpha():
        within = before.isalpha() and after.isalpha()
        return -0.3 if unicodedata.category(sign) in ("Mn", "Nd", "No", "Sc") and not within else -1.0
    script = _script(sign)
    if script == "LATIN":
        value = 1.0 if sign.lower() in alphabet else -0.2
    else:
        value = SCRIPTS.get(script, lambda *_: -1.0)(sign, encoding)
    for other in (before, after):
        if other.isalpha() and _script(other) != script and {script, _script(other)} != {"HAN", "KANA"}:
            value -= 1.0
        elif script == "LATIN" and other > "\x7f" and other.isalpha():
            value -= 0.6
    if sign.isupper() and before.isalpha():
        value -= 1.5 if before.islower() else 0.3
    if script == "LATIN" and not before.isalpha() and not after.isalpha() and sign not in "àáéèêóôúåöÀÉÓÖ":
        value -= 0.6
    return value


@cache
def _script(letter: str) -> str:
    name = unicodedata.name(letter, "").split(" ")[0].split("-")[0]
    return {"CJK": "HAN", "HIRAGANA": "KANA", "KATAKANA": "KANA"}.get(name, name)


def _cyrillic(sign: str, encoding: str) -> float:
    small = sign.lower()
    return 1.0 if small in USUAL_CYRILLIC else 0.4 if small in CYRILLIC else -0.5


def _han(sign: str, encoding: str) -> float:
    levels = [LEVELS[encoding]] if encoding in LEVELS else list(LEVELS.values())
    return 0.9 if any(_is_usual(sign, *level) for level in levels) else -0.6


@cache
def _is_usual(sign: str, encoding: str, first: int, last: int) -> bool:
    try:
        return first <= sign.encode(encoding)[0] <= last
    except UnicodeError:
        return False


SCRIPTS: dict[str, Callable[[str, str], float]] = {
    "CYRILLIC": _cyrillic,
    "GREEK": lambda sign, encoding: 1.0 if sign.lower() in USUAL_GREEK else 0.4,
    "HEBREW": lambda sign, encoding: 0.9,
    "ARABIC": lambda sign, encoding: 0.9,
    "HAN": _han,
    "KANA": lambda sign, encoding: -0.5 if encoding in (*CHINESE, *KOREAN) else 1.0,
    "HANGUL": lambda sign, encoding: 1.0 if _is_usual(sign, "euc_kr", 0xB0, 0xC8) else -0.8,
    "THAI": lambda sign, encoding: 0.6,
    "DEVANAGARI": lambda sign, encoding: 0.8,
}
