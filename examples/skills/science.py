"""Science: which of four things belongs to a class. Each class has a rule, 15 things in it and 16 that are not."""

from __future__ import annotations

from typing import NamedTuple


class Class(NamedTuple):
    """A class of things, as a question names it, and the rule that decides."""

    name: str
    rule: str
    members: list[str]
    others: list[str]


def _class(name: str, rule: str, members: str, others: str) -> Class:
    return Class(name, rule, members.split(", "), others.split(", "))


#: The frame around a class's name. The options come before it: a small model answers at once what ends with options.
QUESTIONS = [
    "Which of these is {name}? State the rule, then the letter.",
    "Which one of these is {name}? State the rule, then the letter.",
    "Which of the four is {name}? State the rule, then the letter.",
]

#: What follows the rule in a worked explanation.
CONCLUSIONS = [
    "Of the four, only {thing} fits. The answer is {letter}.",
    "That is true of {thing} and not of the other three. The answer is {letter}.",
]

CLASSES = [
    _class(
        "a mammal",
        "A mammal has hair and feeds its young with milk.",
        "otter, horse, whale, bat, rabbit, wolf, camel, mouse, dolphin, kangaroo, goat, elephant, squirrel, lion, "
        "sheep",
        "frog, trout, eagle, spider, snake, shrimp, sparrow, bee, lizard, crab, salmon, hen, turtle, ant, toad, duck",
    ),
    _class(
        "a bird",
        "A bird has feathers, a beak and two wings, and it lays eggs.",
        "penguin, owl, robin, swan, parrot, ostrich, pigeon, hawk, crow, goose, flamingo, gull, turkey, heron, finch",
        "moth, bat, cat, bee, frog, mouse, shark, wasp, cow, snail, tuna, fly, dog, worm, eel, fox",
    ),
    _class(
        "an insect",
        "An insect has six legs and a body in three parts.",
        "ant, bee, beetle, wasp, butterfly, mosquito, grasshopper, moth, cricket, ladybird, fly, termite, flea, "
        "locust, cockroach",
        "spider, crab, snail, worm, scorpion, lobster, slug, mouse, frog, tick, robin, shrimp, lizard, oyster, "
        "newt, wren",
    ),
    _class(
        "a fish",
        "A fish lives in water and breathes through gills for all of its life.",
        "salmon, trout, shark, tuna, herring, cod, carp, eel, sardine, pike, mackerel, goldfish, haddock, perch, "
        "halibut",
        "whale, seal, crab, octopus, dolphin, frog, otter, penguin, turtle, duck, walrus, lobster, newt, clam, "
        "swan, squid",
    ),
    _class(
        "a reptile",
        "A reptile has dry scales and warms itself in the sun.",
        "crocodile, cobra, gecko, tortoise, iguana, python, alligator, lizard, viper, turtle, chameleon, "
        "rattlesnake, terrapin, skink, boa",
        "frog, hen, rabbit, salmon, toad, pig, eagle, horse, eel, newt, bear, goose, ant, deer, cod, monkey",
    ),
    _class(
        "an animal that eats mostly plants",
        "A plant eater has broad teeth to grind grass and leaves.",
        "cow, rabbit, horse, giraffe, deer, sheep, zebra, koala, goat, elk, buffalo, antelope, camel, moose, donkey",
        "lion, wolf, shark, eagle, tiger, crocodile, owl, seal, leopard, hyena, cobra, otter, hawk, cheetah, pike, "
        "weasel",
    ),
    _class(
        "a tree",
        "A tree has one tall woody trunk and lives for many years.",
        "oak, pine, maple, birch, willow, beech, cedar, elm, poplar, spruce, ash, fir, chestnut, sycamore, larch",
        "daisy, grass, tulip, moss, wheat, fern, clover, lettuce, rose, mushroom, carrot, nettle, mint, seaweed, "
        "bean, thistle",
    ),
    _class(
        "a flower",
        "A flower has coloured petals that draw insects to its pollen.",
        "rose, tulip, daisy, lily, violet, daffodil, poppy, orchid, sunflower, carnation, iris, marigold, pansy, "
        "primrose, crocus",
        "moss, potato, fern, oak, onion, mushroom, wheat, carrot, pine, grass, rice, cabbage, seaweed, barley, "
        "leek, ivy",
    ),
    _class(
        "a metal",
        "A metal is shiny, bends without breaking and carries electricity well.",
        "copper, iron, gold, silver, zinc, lead, aluminium, nickel, tin, titanium, platinum, chromium, magnesium, "
        "cobalt, tungsten",
        "wood, oxygen, glass, rubber, plastic, helium, wool, paper, chalk, sulphur, cotton, salt, brick, nitrogen, "
        "leather, clay",
    ),
    _class(
        "a gas at room temperature",
        "A gas has no shape of its own and spreads to fill its container.",
        "oxygen, helium, nitrogen, hydrogen, carbon dioxide, neon, methane, argon, ozone, air, chlorine, propane, "
        "butane, krypton, ammonia",
        "iron, water, sand, milk, gold, oil, sugar, wood, copper, vinegar, salt, glass, mercury, ice, honey, chalk",
    ),
    _class(
        "a liquid at room temperature",
        "A liquid flows and takes the shape of its container.",
        "water, milk, olive oil, vinegar, petrol, orange juice, alcohol, mercury, ink, tea, wine, lemonade, "
        "paraffin, coffee, soy sauce",
        "stone, oxygen, iron, wood, helium, glass, brick, silver, nitrogen, paper, diamond, rubber, hydrogen, "
        "chalk, coal, bone",
    ),
    _class(
        "something that a magnet pulls",
        "A magnet pulls things that are made of iron or steel.",
        "iron nail, steel pin, paper clip, iron bolt, steel spoon, needle, iron key, steel screw, horseshoe, iron "
        "filings, steel hammer, thumbtack, iron gate, steel chain, staple",
        "wooden stick, plastic cup, glass bead, rubber ball, paper bag, cotton shirt, leather belt, cork, wool "
        "sock, clay pot, candle, silk scarf, sponge, brick, pebble, straw",
    ),
    _class(
        "something that carries electricity well",
        "Metals carry electricity well, because their electrons move freely.",
        "copper wire, steel fork, gold ring, tin can, aluminium foil, brass key, silver coin, iron rod, metal "
        "ruler, bronze bell, nickel plate, zinc sheet, lead pipe, steel cable, iron pan",
        "rubber glove, glass rod, dry wood, plastic bag, paper towel, wool hat, china plate, cotton thread, leather "
        "shoe, wax candle, cork mat, silk tie, nylon rope, stone tile, foam cup, straw hat",
    ),
    _class(
        "something that makes its own light",
        "A source of light makes light itself and does not only reflect it.",
        "candle flame, the Sun, lightning, torch, light bulb, campfire, firefly, star, lamp, headlight, lantern, "
        "glowing coal, firework, laser, lighthouse",
        "mirror, the Moon, window, white wall, silver spoon, book, table, snow, cloud, stone, curtain, chair, "
        "carpet, pencil, bottle, shoe",
    ),
    _class(
        "something that floats on water",
        "A thing floats if it is lighter than the same volume of water.",
        "cork, wooden log, ice cube, feather, rubber duck, empty bottle, dry leaf, beach ball, foam block, candle, "
        "twig, lily pad, balloon, canoe, ping-pong ball",
        "stone, iron nail, gold ring, brick, coin, marble, steel spoon, lead weight, anchor, glass bead, key, "
        "hammer, pebble, china cup, anvil, padlock",
    ),
    _class(
        "something that dissolves in water",
        "A substance dissolves if its particles spread out through the water.",
        "sugar, salt, honey, baking soda, instant coffee, syrup, food colouring, cocoa drink powder, washing "
        "powder, vitamin tablet, icing sugar, jelly powder, bath salts, milk powder, stock cube",
        "sand, stone, iron, glass, wood, plastic, gold, chalk, rubber, candle wax, copper, gravel, wool, brick, "
        "clay, cork",
    ),
    _class(
        "an organ of the body",
        "An organ is a part of the body with a job of its own.",
        "heart, liver, kidney, lung, brain, stomach, skin, pancreas, bladder, eye, tongue, spleen, intestine, ear, "
        "gall bladder",
        "hat, water, ring, blanket, fever, bread, glove, cough, soap, spoon, sleep, chair, apple, sneeze, towel, "
        "pillow",
    ),
    _class(
        "a living thing",
        "A living thing grows, feeds and makes more of its own kind.",
        "mushroom, oak tree, worm, bacteria, moss, snail, cactus, starfish, yeast, jellyfish, grass, coral, fern, "
        "seaweed, baby",
        "rock, cloud, river, robot, candle, car, wind, ice, clock, sand, mountain, lamp, doll, engine, fire, kite",
    ),
    _class(
        "a fuel that is burned for heat",
        "A fuel gives off heat when it burns in air.",
        "coal, petrol, firewood, natural gas, diesel, charcoal, peat, kerosene, propane, wood pellets, heating oil, "
        "wax, methane, dry straw, paraffin",
        "water, sand, stone, glass, salt, iron, brick, ice, clay, concrete, gravel, gold, chalk, helium, marble, steel",
    ),
    _class(
        "a tool for measuring",
        "A measuring tool has a scale that shows an amount.",
        "thermometer, ruler, clock, kitchen scales, speedometer, barometer, tape measure, stopwatch, measuring cup, "
        "protractor, rain gauge, compass, voltmeter, sundial, altimeter",
        "hammer, pillow, paintbrush, spoon, ladder, rope, curtain, bucket, broom, basket, shovel, candle, blanket, "
        "comb, pencil, umbrella",
    ),
]
