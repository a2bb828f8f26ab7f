# SPDX-License-Identifier: Apache-2.0
"""English sentences from a small seeded grammar: the text that the demo corpus speaks.

About 700 common words, which between them use every phone of English.
"""

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

_T = TypeVar("_T")


def sentence(rng: np.random.Generator) -> str:
    """One to three clauses of everyday words, grammatical and seldom sensible."""
    text = _clause(rng)
    for _ in range(2):
        if rng.random() < 0.45:
            comma = "," if rng.random() < 0.6 else ""
            text += f"{comma} {_pick(rng, _JOINS)} {_clause(rng)}"
    return text


def _clause(rng: np.random.Generator) -> str:
    verb, past = _pick(rng, _VERBS).split(":")
    clauses = (
        lambda: f"{_someone(rng)} {past} {_thing(rng)}",
        lambda: f"{_someone(rng)} {_pick(rng, _ADVERBS)} {past} {_thing(rng)} {_where(rng)}",
        lambda: f"{_someone(rng)} {_pick(rng, _MODALS)} {verb} {_thing(rng)} {_where(rng)}",
        lambda: f"{_someone(rng)} {_pick(rng, _MOVES)} {_pick(rng, _ADVERBS)} {_where(rng)}",
        lambda: f"there was {_thing(rng)} {_where(rng)}",
        lambda: f"{_thing(rng)} {_where(rng)} is too {_pick(rng, _ADJECTIVES)}",
    )
    when = f" {_pick(rng, _TIMES).replace('_', ' ')}" if rng.random() < 0.3 else ""
    return _pick(rng, clauses)() + when


def _someone(rng: np.random.Generator) -> str:
    return _pick(rng, (_pick(rng, _NAMES), _pick(rng, _PRONOUNS), _thing(rng)))


def _where(rng: np.random.Generator) -> str:
    return f"{_pick(rng, _PREPOSITIONS)} {_thing(rng)}"


def _thing(rng: np.random.Generator) -> str:
    if rng.random() < 0.1:
        return f"{_pick(rng, _NOUNS)} number {_pick(rng, _NUMBERS)}"
    words = [_pick(rng, _OWNERS), _pick(rng, _NOUNS)]
    if rng.random() < 0.4:
        words.insert(1, _pick(rng, _ADJECTIVES))
    if words[0] == "a" and words[1][0] in "aeiou":
        words[0] = "an"
    return " ".join(words)


def _pick(rng: np.random.Generator, choices: Sequence[_T]) -> _T:
    return choices[int(rng.integers(len(choices)))]


_NOUNS = (
    "apple arm artist baby bag balcony bath beach bed bell bird boat book bottle boy breath bridge "
    "brother brush bucket bus button cage cake camera candle captain car cat chair chapter church "
    "city cloth cloud coat coin collar cousin cow cup curtain daughter day desk dinner doctor dog "
    "door dress drum ear earth egg engine eye farmer father feather field finger fire fish flower "
    "forest fork friend fruit garage garden gate ghost giant girl glass glove goat guitar hammer "
    "hand hat heart hill horse hour house island jacket job joke journey judge juice jungle kettle "
    "key king kitchen knife ladder lake lamp language law leaf leather letter lion lunch machine "
    "map market measure method mirror moon mother mountain mouse mouth nail neighbour nephew nest "
    "newspaper night nose nurse ocean office oil onion orange oven paper path pencil phone picture "
    "pigeon pilot pillow pipe plan plate pleasure pocket poet point pony potato prison prize "
    "puzzle queen question ring river road roof room rope sailor salad school sea shadow shelf "
    "ship shirt shoe shop shore sister sky soap soldier song soup spoon square stable star station "
    "stone storm story street summer sword table tailor teacher tent thief thing thought thumb "
    "ticket tiger tongue tooth tour towel tower town toy train treasure tree truth tube uncle "
    "university valley vegetable village violin vision visitor voice wall watch water wheel "
    "whistle wife window winter witch wolf woman worker yard year yellow zebra zoo"
).split()
_ADJECTIVES = (
    "angry beautiful big blue bright broken brown busy calm careful cheap clean clever cold "
    "curious dangerous dark dear deep dirty dry early easy empty enormous fair famous fast foolish "
    "fresh funny gentle golden good great green happy heavy high hollow huge hungry important "
    "jealous joyful large lazy little lonely long loud lovely modern narrow new noisy old ordinary "
    "pale patient perfect plain polite poor proud pure quick quiet rare red rich rough round royal "
    "sad safe sharp short shy silent silver simple slow small smooth soft sour strange strong sure "
    "sweet tall thick thin tiny tired ugly unusual usual useful warm weak wet white wide wild wise "
    "wooden worthy wrong young"
).split()
# The plain form and the past of verbs that take an object.
_VERBS = (
    "ask:asked bake:baked borrow:borrowed break:broke bring:brought build:built buy:bought "
    "carry:carried catch:caught change:changed choose:chose clean:cleaned close:closed cook:cooked "
    "cover:covered destroy:destroyed draw:drew enjoy:enjoyed explore:explored feed:fed find:found "
    "fix:fixed follow:followed forget:forgot gather:gathered give:gave hear:heard help:helped "
    "hide:hid hold:held join:joined keep:kept know:knew leave:left lift:lifted lose:lost "
    "love:loved make:made measure:measured meet:met miss:missed move:moved need:needed "
    "notice:noticed open:opened paint:painted pass:passed polish:polished pull:pulled push:pushed "
    "reach:reached refuse:refused remember:remembered repair:repaired save:saved sell:sold "
    "show:showed steal:stole take:took teach:taught thank:thanked throw:threw touch:touched "
    "trust:trusted use:used visit:visited want:wanted wash:washed watch:watched wear:wore"
).split()
_MOVES = (
    "arrived began climbed cried danced fell finished flew grew hurried jumped laughed listened "
    "paused played ran rested returned sang shouted sat slept smiled spoke stayed stood swam "
    "talked travelled vanished waited walked wandered whispered whistled worked yawned"
).split()
_ADVERBS = (
    "always badly bravely calmly carefully easily gladly happily hardly never often quickly "
    "quietly rarely secretly slowly sometimes soon suddenly usually"
).split()
_PREPOSITIONS = (
    "above across after against along around at before behind below beside between beyond by for "
    "from inside into near on over past through toward under with without"
).split()
_NAMES = (
    "Adam Alice Anna Arthur Beth Charles Daisy Edith Emma Eve George Hugh Ivy Jack Jane Joyce "
    "Judith Kate Keith Leo Lucy Martha Mary Michael Noah Oscar Paul Roy Ruth Sam Sheila Simon "
    "Sophie Thomas Vera Walter Wendy Zoe"
).split()
_PRONOUNS = "I you we they he she it everybody nobody somebody".split()
_OWNERS = "the the the a a a my your his her our their this that every another each one".split()
_MODALS = "can could did may might must shall should will would".split()
_NUMBERS = (
    "two three four five six seven eight nine ten eleven twelve thirteen fifteen twenty thirty "
    "fifty sixty"
).split()
_JOINS = "and and but so because while although until when where if or as".split()
# An underscore becomes a space.
_TIMES = (
    "after_dinner at_eight_o'clock at_noon before_breakfast every_Thursday for_an_hour "
    "for_nine_years in_July in_the_evening in_the_morning last_month on_Friday on_Monday once_more "
    "that_autumn this_week today tomorrow tonight twice_a_year yesterday"
).split()
