"""The main object of a caption, in POINTS' six classes: person, text, building, food, animal, plant, or other.

POINTS thins the commonest of them (app. E) but does not state how it tells them apart; here the first noun of a small word
list decides, because captions name their subject first ("a man beside a horse" is about a person). English only: a text
without a known noun is "other".
"""

from __future__ import annotations

from functools import lru_cache

from vlmflow.curation.textnorm import normal
from vlmflow.curation.word_lists import words_of
from vlmflow.curation.words import words

OTHER = "other"
CLASSES = {
    "person": words_of(
        "person people man men woman women boy girl child children kid baby toddler infant lady gentleman guy player athlete "
        "actor actress singer musician band dancer bride groom couple family crowd group student teacher soldier worker "
        "doctor nurse chef cook farmer fisherman politician president minister king queen prince princess model celebrity "
        "driver rider cyclist runner skier surfer skateboarder swimmer footballer batter pitcher goalkeeper team officer "
        "policeman fireman firefighter businessman businesswoman artist painter mother father mom dad son daughter brother "
        "sister friend tourist passenger pedestrian someone face portrait selfie male female adult teenager youth audience "
        "fan customer coach priest monk nun bishop human figure he she"
    ),
    "text": words_of(
        "text word letter sentence quote quotation document page book newspaper magazine letterhead receipt invoice form "
        "screenshot slide infographic diagram chart table graph poster flyer brochure sign signage logo label banner cover "
        "title heading headline caption handwriting note script font typography calligraphy alphabet menu ticket certificate "
        "card calendar map digit number formula equation paper article website webpage"
    ),
    "building": words_of(
        "building house home apartment tower skyscraper church cathedral chapel temple mosque synagogue castle palace fort "
        "fortress hotel villa cottage cabin hut barn bridge stadium arena museum library school university hospital station "
        "airport terminal factory warehouse office shop store mall restaurant cafe pub theater theatre monument lighthouse "
        "gate ruin pyramid architecture facade skyline city town village street mansion condo condominium garage shed room "
        "kitchen bedroom bathroom interior exterior"
    ),
    "food": words_of(
        "food meal dish plate breakfast lunch dinner snack dessert cake cupcake pie pastry bread toast sandwich burger "
        "hamburger pizza pasta spaghetti noodle ramen rice sushi soup stew salad cheese egg omelette meat beef pork steak bacon "
        "sausage ham fruit apple banana orange lemon lime grape strawberry blueberry raspberry berry cherry peach pear "
        "mango pineapple watermelon melon vegetable tomato potato carrot broccoli onion garlic pepper cucumber lettuce "
        "mushroom corn bean chocolate candy cookie biscuit doughnut donut waffle pancake yogurt coffee tea juice wine beer "
        "cocktail drink beverage smoothie milk sauce curry taco burrito fries recipe"
    ),
    "animal": words_of(
        "animal dog puppy cat kitten bird eagle owl parrot duck goose swan chicken rooster hen turkey penguin seagull pigeon "
        "crow hawk horse pony donkey cow bull calf cattle sheep lamb goat pig bear panda lion tiger leopard cheetah elephant "
        "giraffe zebra deer moose elk fox wolf rabbit bunny hare squirrel mouse mice rat hamster monkey ape gorilla "
        "chimpanzee kangaroo koala camel llama hippo hippopotamus rhino rhinoceros fish shark whale dolphin seal turtle "
        "tortoise frog toad snake lizard crocodile alligator dinosaur insect bee wasp butterfly moth ant spider beetle "
        "dragonfly crab lobster octopus jellyfish snail pet wildlife herd flock"
    ),
    "plant": words_of(
        "plant tree flower rose tulip lily orchid daisy sunflower lavender blossom bloom bouquet petal leaf leaves foliage "
        "grass lawn meadow bush shrub hedge fern moss cactus succulent palm pine oak maple birch willow bamboo ivy vine "
        "garden forest wood woodland jungle orchard field herb basil mint seedling sapling trunk branch wreath"
    ),
    OTHER: words_of(
        "car bus truck train plane airplane aeroplane helicopter boat ship yacht bicycle bike motorcycle scooter van tram subway "
        "rocket vehicle tractor wheel road highway track beach sea ocean lake river waterfall mountain hill valley desert sky "
        "cloud sunset sunrise snow rain star moon sun planet rock stone sand water fire smoke table chair sofa couch bed desk "
        "lamp mirror clock watch vase bottle cup mug glass bowl knife fork spoon bag backpack suitcase umbrella shoe boot "
        "sneaker shirt dress jacket coat hat cap skirt trousers jeans sock ring necklace earring bracelet jewelry phone "
        "smartphone laptop computer keyboard monitor tablet camera television tv remote guitar piano violin drum toy ball doll "
        "robot tool hammer box furniture sculpture statue painting pattern background wallpaper icon "
        "square circle triangle rectangle shape line flag globe candle pillow blanket curtain carpet"
    ),
}
"""Class -> nouns, plural forms where `textnorm.normal` does not find them."""
PAIRS = {
    ("hot", "dog"): "food", ("palm", "tree"): "plant", ("ice", "cream"): "food", ("teddy", "bear"): OTHER,
    ("table", "of"): "", ("book", "cover"): "text", ("street", "sign"): "text", ("computer", "mouse"): OTHER, ("rose", "gold"): "",
    ("orange", "juice"): "food", ("french", "fry"): "food", ("fire", "truck"): OTHER, ("flower", "pot"): OTHER,
}  # fmt: skip
"""Two words that together name something else than the first alone; "" = a description, no object."""
ADJECTIVES = frozenset(
    {"orange", "rose", "lime", "peach", "cherry", "model", "human", "male", "female", "chocolate", "pet"}
)
"""Nouns of the lists that before another word most often describe it: they count only where no other noun is found."""


def main_object(text: str) -> str:
    """The class of the first noun of `text` that the lists know, else "other"."""
    found = [normal(word) for word in words(text)]
    fallback = OTHER
    skip = False
    for word, after in zip(found, [*found[1:], ""], strict=False):
        if skip:
            skip = False
        elif (word, after) in PAIRS:
            if PAIRS[word, after]:
                return PAIRS[word, after]
            skip = True
        elif word in _class_of():
            if word not in ADJECTIVES or not after:
                return _class_of()[word]
            fallback = fallback if fallback != OTHER else _class_of()[word]
    return fallback


@lru_cache(maxsize=1)
def _class_of() -> dict[str, str]:
    return {normal(noun): name for name, nouns in reversed(CLASSES.items()) for noun in nouns}
