"""Which of the 80 MSCOCO objects a caption speaks of, as CHAIR's original implementation finds out.

Lower case -> words -> their singulars -> certain pairs of words taken together -> words that name an object -> the
object. A word that stands there twice is counted twice.

What counts as the name of an object was collected by Rohrbach et al. 2018, arXiv 1809.02156 (their list: BSD-2). It
is grouped by object here, without the names that their program cannot find: it cuts lines at ", ", so that
" cheesecake" and " motor bike" begin with a space; "iPhone" has a capital letter, the caption has none; "stove top
oven" has three words, and "dining table" is no pair.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from visgain.evaluation.singular import singular

_NAMED = """
airplane: air_plane airbus aircraft biplane jet jetliner monoplane plane seaplane
backpack: knapsack
bear: panda
bench: pew
bicycle: bike minibike trike unicycle
bird: blackbird bluebird bluejay buzzard chickadee cockatiel cockatoo condor cormorant cowbird crow duck egret
    falcon finch flamingo fowl goose gosling gull heron hummingbird kingfisher loon lorikeet macaw magpie mallard
    oriole osprey ostrich owl parakeet parrot peacock peafowl pelican pheasant pigeon puffin quail raven robin
    rooster sandpiper seabird seagull shorebird songbird sparrow swan turkey vulture warbler waterbird waterfowl
    willet woodpecker
boat: barge battleship canoe catamaran dinghy ferry ferryboat freighter houseboat kayak lifeboat liner motorboat
    paddleboat pontoon powerboat riverboat rowboat sailboard sailboat schooner ship skiff speedboat steamboat
    steamship trawler tugboat vessel watercraft yacht
bowl: container
bus: minibus trolley
cake: coffeecake cupcake pancake shortcake
car: automobile cab coupe hatchback jeep limo minivan sedan suv taxi taxicab van
cat: feline kitten tabby
cell_phone: cellphone mobile_phone phon phone smartphone telephone
chair: seat stool
couch: chesterfield futon loveseat recliner settee sofa
cow: bison buffalo bull calf cattle heifer holstein ox oxen zebu
dining_table: desk table
dog: beagle brindle bulldog canine chihuahua cocker collie corgi dachshund doberman doggie doggy greyhound hound
    husky labrador mutt pitbull poodle pug pup puppy retriever rottweiler schnauzer sheepdog spaniel terrier
    weimaraner whippet
donut: bagel doughnut
fire_hydrant: hydrant
hair_drier: hairdryer
handbag: briefcase purse wallet
horse: bronc bronco clydesdale colt equine foal mare mustang palomino pony racehorse stallion
knife: knive pocketknife
laptop: computer laptop_computer lenovo macbook netbook notebook
motorcycle: moped motor_cycle motorbike scooter
oven: stove stovetop
person: adult baby baker bicyclist biker boy bride buyer caller camper chef child children cop cowboy coworker
    doctor drinker driver father female foreigner gentleman girl grandchild groom guy hunter kid lady male man
    mother offender officer passenger patient people pitcher player policeman politician rider serviceman shopper
    sister skateboarder skater skier snowboarder soldier solider student teenager thief traveler trespasser villager
    walker woman worker
potted_plant: houseplant
refrigerator: freezer fridge
sandwich: burger cheeseburger hamburger sub
sheep: ewe goat lamb ram
skis: ski
sports_ball: ball
suitcase: luggage suit_case
surfboard: longboard shortboard skimboard wakeboard
teddy_bear: teddybear
tennis_racket: racket
tie: bow bow_tie
toilet: commode lavatory potty urinal
traffic_light: stop_light stoplight street_light streetlight traffic_signal
train: caboose locomotive tramway
truck: firetruck hauler lorry pickup
tv: monitor television televison
"""
"""An object, and what else it is called; `_` stands for a space. An indented line goes on."""

_ONLY_THEMSELVES = (
    "apple banana baseball_bat baseball_glove bed book bottle broccoli carrot clock cup elephant fork frisbee "
    "giraffe hot_dog keyboard kite microwave mouse orange parking_meter pizza remote scissors sink skateboard "
    "snowboard spoon stop_sign toaster toothbrush umbrella vase wine_glass zebra"
)

_PAIRS_KEPT = (
    "motor_bike motor_cycle air_plane traffic_light street_light traffic_signal stop_light fire_hydrant stop_sign "
    "parking_meter suit_case sports_ball baseball_bat baseball_glove tennis_racket wine_glass hot_dog cell_phone "
    "mobile_phone teddy_bear hair_drier potted_plant laptop_computer home_plate train_track"
)
"""Pairs that are one word. The last two are no objects: they keep a plate and a train track from being some."""

_YOUNG_AND_OLD = "bird cat dog horse sheep cow elephant bear zebra giraffe animal cub"
_VEHICLES = "jet train"


def _table() -> dict[str, str]:
    objects = {name: name for name in _spaced(_ONLY_THEMSELVES)}
    for line in _NAMED.replace("\n    ", " ").strip().split("\n"):
        name, _, others = line.partition(":")
        [canonical] = _spaced(name)
        objects |= dict.fromkeys((canonical, *_spaced(others)), canonical)
    return objects


def _spaced(words: str) -> list[str]:
    return [word.replace("_", " ") for word in words.split()]


def _pairs() -> dict[str, str]:
    pairs = {pair: pair for pair in _spaced(_PAIRS_KEPT)}
    pairs |= {f"{age} {animal}": animal for animal in _YOUNG_AND_OLD.split() for age in ("baby", "adult")}
    pairs |= {f"passenger {vehicle}": vehicle for vehicle in _VEHICLES.split()}
    return pairs | {"bow tie": "tie", "toilet seat": "toilet", "wine glas": "wine glass"}


OBJECT_OF = _table()
"""Name in the singular -> object."""

OBJECTS = tuple(sorted(set(OBJECT_OF.values())))

PAIRS = _pairs()

_TOKEN = re.compile(r"\w+(?:[-/.']\w+)*|[^\w\s]")
_CLITIC = re.compile(r"(.+)('s|n't)")


def tokens(caption: str) -> list[str]:
    """Words and single marks in lower case, `'s` and `n't` apart from what they lean on.

    Stands in for NLTK's tokenizer, which needs a model that pip does not install. A sentence's last full stop, quotes
    and what is possessive must come off, as they do there; other differences do not reach the objects.
    """
    found: list[str] = []
    for token in _TOKEN.findall(caption.lower()):
        clitic = _CLITIC.fullmatch(token)
        found += clitic.groups() if clitic else [token]
    return found


def objects(caption: str) -> list[str]:
    """The objects that a caption mentions, in order and with repetitions."""
    return objects_of([singular(word) for word in tokens(caption)])


def objects_of(words: Sequence[str]) -> list[str]:
    """The objects that words in their basic form mention, in order and with repetitions."""
    merged: list[str] = []
    place = 0
    while place < len(words):
        pair = PAIRS.get(" ".join(words[place : place + 2]))
        merged.append(words[place] if pair is None else pair)
        place += 1 if pair is None else 2
    if "toilet" in merged and "seat" in merged:  # that of the toilet is no chair
        merged = [word for word in merged if word != "seat"]
    return [OBJECT_OF[word] for word in merged if word in OBJECT_OF]
