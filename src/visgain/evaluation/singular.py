"""The singular of an English noun as CHAIR's original implementation forms it, mistakes included.

That implementation calls `singularize` of clips/pattern (BSD-3), which cannot be installed any more: the package of
that name is now another. These are its rules, in their order, written anew and for words in lower case. Its mistakes
are part of published numbers: bus -> bu, glass -> glas, this -> thi, ties -> ty.
"""

from __future__ import annotations

import re
from functools import lru_cache

_PREPOSITIONS = (
    "about above across after among around at athwart before behind below beneath beside besides between betwixt "
    "beyond but by during except for from in into near of off on onto out over since till to under until unto upon "
    "with"
)
"""After one of these a compound's first part is the noun: passers-by."""

_WITHOUT_PLURAL = (
    "bison bream breeches britches carp chassis christmas clippers cod contretemps corps debris diabetes djinn eland "
    "elk flounder gallows georgia graffiti headquarters herpes high-jinks homework innings jackanapes mackerel "
    "measles mews mumps news pincers pliers proceedings rabies salmon scissors series shears species swine swiss "
    "trout tuna whiting wildebeest"
)
_UNCOUNTABLE = (
    "advice bread butter cheese electricity equipment fruit furniture garbage gravel happiness information ketchup "
    "knowledge love luggage mathematics mayonnaise meat mustard progress research rice sand software understanding "
    "water"
)
"""A word is left as it is if one of these two ENDS with it (so `as` and `quarters` are), not only if it is one."""

_IN_IE = (
    "alerg aunt bean bird bog bomb coll cook cut dogg eyr freeb goon group hank hipp hoag hott ind junk ladd laram "
    "linger mean newb night old pix quick rever rook soft sort stool sweet tech tough valkyr vegg ween yupp zomb"
)
"""Words that end with one of these and -ies stay in the plural. Pies and ties were meant to be among them."""

_IRREGULAR = (
    "atlantes atlas, atlases atlas, axes axe, beeves beef, brethren brother, children child, corpora corpus, "
    "corpuses corpus, ephemerides ephemeris, feet foot, ganglia ganglion, geese goose, genera genus, genii genie, "
    "graffiti graffito, helves helve, kine cow, leaves leaf, loaves loaf, men man, mongooses mongoose, monies money, "
    "moves move, mythoi mythos, numena numen, occipita occiput, octopodes octopus, opera opus, opuses opus, our my, "
    "oxen ox, penes penis, penises penis, people person, sexes sex, soliloquies soliloquy, teeth tooth, testes testis, "
    "trilbys trilby, turves turf, zoa zoon"
)
"""Ends of words, not words: women -> woman, but four -> fmy too."""

_RULES = r"""
    (?<=.)ae$ a                 (?<=.)itis$ itis            (?<=.)eaux$ eau             (?<=quiz)zes$ -
    (?<=matr)ices$ ix           (ap|vert|ind)ices$ \1ex     ^oxen ox                    (alias|status)es$ \1
    (?<=[octp|vir])i$ us        (cris|ax|test)es$ \1is      (?<=shoe)s$ -               (?<=o)es$ -
    (?<=bus)es$ -               (?<=[m|l])ice$ ouse         (x|ch|ss|sh)es$ \1          movies$ movie
    (?<=.)ombies$ ombie         series$ series              ([^aeiouy]|qu)ies$ \1y      (?<=[aeo]l)ves$ f
    (?<=[^d]ea)ves$ f           arves$ arf                  erves$ erve                 (?<=[nlw]i)ves$ fe
    (?<=[lr])ves$ f             (?<=[aeo])ves$ ve           (?<=[sth]ive)s$ -           (?<=[^f])ves$ fe
    ^analyses$ analysis         analyses$ analyasis         (ba|diagno|parenthe|progno|synop|the)ses$ \1sis
    (?<=.)opses$ opsis          (?<=.)yses$ ysis            (h|d|r|o|n|b|cl|p)oses$ \1ose
    (?<=.)oses$ osis            (?<=[ti])a$ um              news$ news                  s$ -
"""
"""Pattern and replacement; the first that is found is applied."""

_BEFORE_NOUN = frozenset(_PREPOSITIONS.split())
_UNCHANGED = (*_WITHOUT_PLURAL.split(), *_UNCOUNTABLE.split())
_LEFT_PLURAL = tuple(f"{word}ies" for word in _IN_IE.split())
_ENDS = [pair.split() for pair in _IRREGULAR.split(", ")]
_COMPILED = [
    (re.compile(pattern), "" if replacement == "-" else replacement)
    for pattern, replacement in zip(_RULES.split()[::2], _RULES.split()[1::2], strict=True)
]


@lru_cache(maxsize=1 << 16)
def singular(word: str) -> str:
    """The singular of `word`, which is in lower case; itself where no rule applies."""
    first, *rest = word.split("-")
    if rest and rest[0] in _BEFORE_NOUN:
        return "-".join([singular(first), *rest])
    if word.endswith("'"):
        return singular(word[:-1]) + "'s"
    if word.endswith(_LEFT_PLURAL) or any(known.endswith(word) for known in _UNCHANGED):
        return word
    for plural, one in _ENDS:
        if word.endswith(plural):
            return word.removesuffix(plural) + one
    for pattern, replacement in _COMPILED:
        if pattern.search(word):
            return pattern.sub(replacement, word)
    return word
